"""Modules while they are worked on: forwards that are replaced, and parameters that can take part in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Forwards:
    """Forwards of modules that stand in for their own until `restore`."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, Any]] = []

    def replace(self, module: nn.Module, make: Callable[[Any], Any]) -> None:
        """make: forward that is there -> forward."""
        self._before.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = make(module.forward)

    def restore(self) -> None:
        for module, before in reversed(self._before):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before
        self._before.clear()


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
