"""Error feedback for 4 bits: the walk of `formats.gptq` on the inputs that a layer gets from the quantized ones before.

Where the float network's input F is known beside the quantized one X, the weight is first moved to where it makes up
for what came before it: the minimum of || X w'^T - F w^T ||^2, by ridge regression around w (as TFMQ's own TIAR does).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import int4
from ..formats.gptq import factors, places
from ..formats.int4 import Grid

LIMIT = 4096  # columns of one matrix; a wider weight is taken in blocks that do not know of each other
# Shares of the mean diagonal of H: the first that can be factorized is taken.
DAMPINGS = (1e-2, 1e-1, 1.0)
PULL_DAMPING = 0.1


class Gram:
    """Sum of X^T X over positions, float32, in diagonal blocks of equal width of at most `limit` columns."""

    def __init__(self, columns: int, device: torch.device, limit: int = LIMIT) -> None:
        self.width = block_width(columns, limit)
        self.blocks = torch.zeros(columns // self.width, self.width, self.width, device=device)
        self.positions = 0
        self.pull: Tensor | None = None  # sum of ((F - X) w^T)^T X, [N, K']

    def add(self, x: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """x [M, K']; dtype: what the products are computed in."""
        self.positions += x.shape[0]
        for block, part in zip(self.blocks, x.to(dtype).split(self.width, 1), strict=True):
            block += part.t() @ part

    def add_pull(self, x: Tensor, missing: Tensor) -> None:
        """x [M, K'], of a batch that `add` has had; missing [M, N]: what the float output has more than x w^T."""
        found = missing.t().float() @ x.float()
        self.pull = found if self.pull is None else self.pull.add_(found)

    def moved(self, columns: Tensor, damping: float = PULL_DAMPING) -> Tensor:
        """The weight near `columns` [N, K'] whose output on X is nearest to the float output."""
        if self.pull is None:
            return columns
        out = columns.clone()
        for number, block in enumerate(self.blocks):
            part = slice(number * self.width, (number + 1) * self.width)
            damped = block.clone()
            damped.diagonal().add_(damping * block.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not int(failed):
                out[:, part] += torch.cholesky_solve(self.pull[:, part].t(), lower).t()
        return out

    def excess(self, difference: Tensor) -> float:
        """|| X w'^T - F w^T ||^2 for w' = w + difference [N, K'], mean over positions, less what it is for w."""
        rest = 0.0 if self.pull is None else 2 * float((difference * self.pull).sum(1).cpu().double().sum())
        return self.error(difference) - rest / max(self.positions, 1)

    @property
    def mean_square(self) -> Tensor:
        """Of every column, float32 [K']."""
        return self.blocks.diagonal(dim1=1, dim2=2).flatten() / max(self.positions, 1)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    def error(self, difference: Tensor) -> float:
        """Mean over the positions of || difference x ||^2, difference [N, K'] (blocks taken as independent)."""
        total = 0.0
        for block, part in zip(self.blocks, difference.split(self.width, 1), strict=True):
            total += float(((part @ block) * part).sum(1).cpu().double().sum())
        return total / max(self.positions, 1)


def block_width(columns: int, limit: int = LIMIT) -> int:
    """Width of the widest equal blocks of at most `limit` columns."""
    blocks = -(-columns // limit)
    while columns % blocks:
        blocks += 1
    return columns // blocks


def input_columns(x: Tensor, geometry: tuple | None) -> Tensor:
    """The input of a layer as the rows that its weight's columns are multiplied by.

    x [..., K] -> [M, K]. With geometry (kernel, stride, padding, dilation; pairs): [B, C, H, W] -> [M, kh * kw * C],
    columns in the order [kh, kw, C] of `int4.to_columns`.
    """
    if geometry is None:
        return x.reshape(-1, x.shape[-1])
    kernel, stride, padding, dilation = geometry
    unfolded = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)  # [B, C * kh * kw, L]
    b, _, positions = unfolded.shape
    taps = kernel[0] * kernel[1]
    return unfolded.view(b, x.shape[1], taps, positions).permute(0, 3, 2, 1).reshape(b * positions, -1)


def feedback(columns: Tensor, grid: Grid, gram: Gram) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K'], and the real-valued place on the grid that each was rounded from, float32 [N, K'].

    columns float32 [N, K']. Where the feedback cannot be computed or does not lower || X dW^T ||^2, nearest rounding.
    """
    step = int4.step(grid)
    zero = grid.zero.float().repeat_interleave(grid.group, 1)
    place = torch.empty_like(columns)
    for number, block in enumerate(gram.blocks):
        part = slice(number * gram.width, (number + 1) * gram.width)
        place[:, part] = _walk(columns[:, part], step[:, part], zero[:, part], block)
    codes = place.round().to(torch.uint8)
    nearest = int4.nearest(columns, grid)
    if gram.error(int4.values(codes, grid) - columns) < gram.error(int4.values(nearest, grid) - columns):
        return codes, place
    return nearest, int4.place(columns, grid).clamp_(0, int4.TOP)


def _walk(columns: Tensor, step: Tensor, zero: Tensor, hessian: Tensor) -> Tensor:
    order = hessian.diagonal().argsort(descending=True)
    return places(columns, step, zero, int4.TOP, order, _factor(hessian[order][:, order]))


def _factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped matrix."""
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    for damping in DAMPINGS:
        damped = hessian / mean
        damped.diagonal().add_(damping)
        found = factors(damped)
        if found is not None:
            return found[1]
    return torch.eye(hessian.shape[0], device=hessian.device)  # no feedback
