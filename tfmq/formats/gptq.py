"""GPTQ's walk over the columns of a weight (2210.17323, section 3), on a grid that is fixed beforehand.

The columns are rounded one after another, and the error of each is made up for by those that are still free: with
H = X^T X of the layer's inputs X, they minimise || X dW^T ||^2 after each rounding. They can be taken in any order;
those with the most energy come first, when the most others are left to help.

What the errors so far mean for a column comes from the upper Cholesky factor of H^-1 (`places`), or, where X has few
rows, from X itself (`tfmq.solve.gptq8`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 64


def walk(columns: Tensor, order: Tensor, width: int, make: Callable[[slice, Tensor], None]) -> Tensor:
    """What `make` puts in the place of the columns; columns and result float [N, K], order int64 [K].

    make: called for `width` columns at a time, with their place and all columns, [K, N], in that order. It writes its
    result over those of the block and may move those behind it.
    """
    w = columns.t()[order].contiguous()  # a row per column
    for start in range(0, w.shape[0], width):
        make(slice(start, min(start + width, w.shape[0])), w)
    out = torch.empty_like(w)
    out[order] = w
    return out.t()


def places(columns: Tensor, step: Tensor, zero: Tensor, top: int, order: Tensor, upper: Tensor) -> Tensor:
    """The real-valued place on its grid from which each entry is rounded to its code, float [N, K] in 0 .. top.

    columns [N, K]; step and zero of the grid, [N, K] or [N, 1]; order: of the walk, int64 [K]; upper [K, K]: of
    `factors`, of H in that order.
    """
    size, offset = (part.expand_as(columns).t()[order].contiguous() for part in (step, zero))

    def make(at: slice, w: Tensor) -> None:
        part, factor = w[at], upper[at, at]
        errors = torch.empty_like(part)
        scaled = (factor / factor.diagonal().unsqueeze(1)).contiguous()
        for i, (own, unit, middle) in enumerate(zip(part, size[at], offset[at], strict=True)):
            place = torch.addcdiv(middle, own, unit).clamp_(0, top)
            torch.sub(own, place.round().sub_(middle).mul_(unit), out=errors[i])
            own.copy_(place)
            if i + 1 < len(part):
                part[i + 1 :].addr_(scaled[i, i + 1 :], errors[i], alpha=-1)
        errors /= factor.diagonal().unsqueeze(1)
        w[at.stop :].addmm_(upper[at, at.stop :].t(), errors, alpha=-1)

    return walk(columns, order, BLOCK, make)


def factors(damped: Tensor) -> tuple[Tensor, Tensor] | None:
    """The inverse of a damped H [K, K] and the upper Cholesky factor of that, or None where it is damped too little."""
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if int(failed) or not bool(torch.isfinite(upper).all()) else (inverse, upper)
