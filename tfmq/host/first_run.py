"""The first call of a MODEL on a GPU compiles its kernels, which takes a while: a bar in the node that runs.

Which kernels it needs depends on the size of the picture, so that nothing can be compiled before. An interrupt is taken
between two of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..kernels.table import pick
from ..kernels.triton.tune import TRIED, Shape, watched
from ..runtime.leaf import LeafCore
from ..scheme import NONE, Plan
from .model import PREFIX

WRAPPER = "tfmq_first_run"
SECONDS_BETWEEN_LINES = 15.0  # of the log


def attach(patcher: ModelPatcher, plan: Plan) -> None:
    """Watch the calls of a MODEL whose leaves are in place, where any of them runs on Triton."""
    expected = kinds(patcher, plan)
    if expected:
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER, FirstRun(expected))


def kinds(patcher: ModelPatcher, plan: Plan) -> int:
    """How many different products its leaves take to Triton on the device that it loads to, as far as can be told
    without the size of the picture."""
    device = torch.device(patcher.load_device)
    found = set()
    for path, scheme in plan.layers.items():
        leaf = patcher.get_model_object(PREFIX + path)
        if not isinstance(leaf, LeafCore) or scheme.activation == NONE:
            continue
        g = leaf.geometry
        if pick(leaf.operation, device, g).name == "triton":
            found.add((g.shape, g.stride, scheme.weight_bits, scheme.group, leaf.operation))
    return len(found)


class FirstRun:
    """APPLY_MODEL wrapper. expected: products that have to be compiled, about."""

    def __init__(self, expected: int) -> None:
        self.expected = expected

    def __call__(self, executor: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with watched(_Bar(self.expected)):
            return executor(x, *args, **kwargs)


class _Bar:
    """Of one call; made at its first kernel that is new to this process."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.met: set[Shape] = set()
        self.bar: Any = None
        self.said = 0.0

    def __call__(self, shape: Shape, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.met.add(shape)
        shapes, before = max(self.expected, len(self.met)), len(self.met) - 1
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(shapes * TRIED)
        self.bar.update_absolute(before * TRIED + TRIED * done // total, shapes * TRIED)
        if time.monotonic() - self.said > SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            logging.info(
                "TFMQ: compiling int8 kernels for this GPU, once per size of picture: %d of about %d done, %d left",
                before, shapes, shapes - before,
            )  # fmt: skip
