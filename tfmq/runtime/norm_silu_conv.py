"""GroupNorm, SiLU and a quantized convolution that follow each other in an nn.Sequential, computed as one.

A static grid is known before its layer runs, so that what the norm and the SiLU make need not go to memory in float.
Where the leaf at this moment or its backend cannot do that, torch computes them as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import Norm
from .fused import Fused
from .leaf import LeafCore

NORMS: tuple[Any, ...] = (nn.GroupNorm.forward,)


def end(modules: Sequence[nn.Module], start: int, is_leaf: Callable[[nn.Module], bool], norms: Sequence[Any]) -> int:
    """Where a chain that begins at `start` ends, behind its convolution; `start` if there is none.

    Between SiLU and convolution there may be layers that do nothing in evaluation. norms: `forward` of the classes
    that count as GroupNorm.
    """
    norm = modules[start]
    if not isinstance(norm, nn.GroupNorm) or type(norm).forward not in norms or not norm.affine:
        return start
    at = start + 1
    if at == len(modules) or type(modules[at]) is not nn.SiLU:
        return start
    at += 1
    while at < len(modules) and type(modules[at]) in (nn.Dropout, nn.Identity):
        at += 1
    return at + 1 if at < len(modules) and is_leaf(modules[at]) else start


def together(norm: Any, leaf: Any, x: Tensor) -> Tensor:
    """norm: nn.GroupNorm; leaf: of a convolution."""
    y: Tensor = leaf(x, Fused(Norm(norm.num_groups, norm.weight, norm.bias, norm.eps)))
    return y


def run(
    sequence: nn.Sequential,
    x: Tensor,
    together: Callable[[Any, Any, Tensor], Tensor] = together,
    norms: Sequence[Any] = NORMS,
) -> Tensor:
    """sequence(x). together: of a norm, a leaf and the norm's input, leaf(SiLU(norm(input)))."""
    if torch.compiler.is_compiling():  # a compiler fuses what it sees; it would not see into this
        return nn.Sequential.forward(sequence, x)
    modules, at = list(sequence), 0
    while at < len(modules):
        stop = end(modules, at, _is_leaf, norms)
        if stop > at and all(map(untouched, modules[at:stop])):
            x = together(modules[at], modules[stop - 1], x)
            at = stop
        else:
            x = modules[at](x)
            at += 1
    return x


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, LeafCore) and module.geometry.is_conv


def untouched(module: nn.Module) -> bool:
    """Whether nobody watches or replaces what this module computes."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if isinstance(module, nn.Dropout) and module.training and module.p > 0:
        return False
    return getattr(module.forward, "__func__", None) is type(module).forward
