"""A chain of row-wise layers, computed in blocks of rows, so that what lies between them stays in the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..scheme import NONE, STATIC, Scheme

BLOCK = 1 << 21  # bytes of the widest tensor in between, per thread
LEAST_ROWS = 1024  # of a block: with fewer, reading the weights and starting the threads takes the time


def in_blocks(function: Callable[[Tensor], Tensor], x: Tensor, width: int, least: int | None = None) -> Tensor:
    """function(x), for x [..., K] and a function of whose result [..., N] each row depends on its own row of x alone.

    width: entries per row of the widest tensor in between. Outside of that function no such tensor is ever whole.
    least: rows of a block, at least; LEAST_ROWS if nothing else is said.
    """
    least = LEAST_ROWS if least is None else least
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    step = max(least, BLOCK * torch.get_num_threads() // (width * x.element_size()))
    if count < 2 * step:
        return function(x)
    step = -(-count // (count // step))  # of equal length: a short one at the end would cost nearly as much as a long
    first = function(rows[:step])
    out = first.new_empty(count, first.shape[-1])
    out[:step] = first
    for start in range(step, count, step):
        out[start : start + step] = function(rows[start : start + step])
    return out.view(*x.shape[:-1], -1)


def gated_blocks(width: int, scheme: Scheme) -> tuple[int, int]:
    """`width` and `least` of a network that begins with a Linear of `width` outputs and its GEGLU.

    Where the layer is static a backend may compute the two as one, and what lies behind it is half as wide.
    """
    return (width // 2, 2 * LEAST_ROWS) if scheme.activation == STATIC else (width, LEAST_ROWS)


def suits(scheme: Scheme) -> bool:
    """Whether such a layer is as fast and as right in blocks of rows.

    One that decodes its weight at every call would do so for each block; and with the branches of CFG apart, a row's
    grid depends on where in the batch it stands.
    """
    return scheme.weight_bits == 8 and scheme.activation != NONE and scheme.branches == 1
