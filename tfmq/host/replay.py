"""The model calls that a calibration kept, run again on the float MODEL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import copy_nested_dicts
from torch import Tensor

from ..observe.samples import Samples
from ..rounding.samples import Source
from .model import release


class Replay:
    """Runs the float MODEL on rows of the samples."""

    def __init__(self, patcher: ModelPatcher, samples: Samples | None) -> None:
        self.patcher, self.samples = patcher, samples or Samples(())
        options = create_model_options_clone(patcher.model_options)["transformer_options"]
        options["wrappers"] = copy_nested_dicts(patcher.wrappers)
        options["callbacks"] = copy_nested_dicts(patcher.callbacks)
        # The host's other attentions are not all made for gradients.
        options["optimized_attention_override"] = lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)
        self.options = options

    def __call__(self, indices: list[int]) -> Tensor:
        """What the MODEL predicts for these rows, [B, ...]."""
        device = self.patcher.load_device
        x, sigma, conditions = self.samples.batch(indices)
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in conditions.items()}
        sigma = sigma.to(device)
        options = {
            **copy_nested_dicts(self.options),
            "cond_or_uncond": [self.samples.rows[i].branch for i in indices],
            "sigmas": sigma,
        }
        return self.patcher.model.apply_model(x.to(device), sigma, transformer_options=options, **moved)

    def source(self) -> Source:
        rows = self.samples.rows
        return Source(
            self,
            torch.tensor([row.interval for row in rows], dtype=torch.int64),
            torch.tensor([row.branch for row in rows], dtype=torch.int64),
            [row.run for row in rows],
            [row.shape for row in rows],
        )


@contextmanager
def replayed(
    clone: ModelPatcher, samples: Samples | None, load: bool = True, gradients: bool = False
) -> Iterator[Replay]:
    """The samples and the MODEL to run them, loaded. gradients: with attention that has a gradient."""
    replay = Replay(clone, samples)
    training = comfy.model_management.in_training
    try:
        if load:
            comfy.model_management.load_models_gpu([clone])
        clone.pre_run()
        # Some of the host's kernels have no gradient; while this is set it takes others.
        comfy.model_management.in_training = training or gradients
        yield replay
    finally:
        comfy.model_management.in_training = training
        clone.cleanup()
        release(clone)
