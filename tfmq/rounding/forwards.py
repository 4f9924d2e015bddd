"""Modules that compute something else for a while, and modules whose parameters can take part in training.

`Forwards` is the one way to replace what a module of a network computes, where the host's patcher does not do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Forwards:
    """Forwards that stand in the place of others until the block ends, or until `restore`."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, Any]] = []

    def replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """A module may be given another one on top of the first: what it had is its `forward` until then."""
        self._before.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    def restore(self) -> None:
        """Everything as it was; an override of somebody else's is back as well."""
        while self._before:
            module, before = self._before.pop()
            module.__dict__.pop("forward", None)
            if before is not None:
                module.__dict__["forward"] = before

    def __enter__(self) -> Forwards:
        return self

    def __exit__(self, *_: Any) -> None:
        self.restore()


@contextmanager
def plain_parameters(
    module: nn.Module, leave: set[nn.Module], device: torch.device, widen: bool = True
) -> Iterator[None]:
    """Parameters and buffers of a module as copies on `device`, without gradients, until the block ends.

    The host loads models inside of inference mode, and autograd refuses tensors that were made there. leave: modules
    whose own parameters are not used. widen: floats to float32; else they keep their type.
    """
    before: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for child in module.modules():
            if child in leave:
                continue
            holders: tuple[dict[str, Any], ...] = (child._parameters, child._buffers)
            for held in holders:
                for name, tensor in held.items():
                    if tensor is None:
                        continue
                    before.append((held, name, tensor))
                    copy = tensor.detach().to(device, copy=True)
                    merge = getattr(child, f"{name}_lowvram_function", None)
                    if merge is not None:  # a patch that the host would merge as it streams the weight in
                        copy = merge(copy)
                    copy = copy.float() if widen and copy.is_floating_point() else copy
                    held[name] = nn.Parameter(copy, requires_grad=False) if held is child._parameters else copy
        yield
    finally:
        for held, name, tensor in before:
            held[name] = tensor
