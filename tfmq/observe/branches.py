"""Whether conditional and unconditional rows need ranges of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats.affine import affine_grid, histogram_error, search_range
from ..runtime.branches import CONDITIONAL

# A layer with two grids runs in two pieces; below this ratio of squared errors it is worth that.
WORTHWHILE = 0.8


def branch_of_rows(batch: int, rows: int, branches: Sequence[int]) -> Tensor:
    """Branch of each row of a tensor [batch * m, ...], int64 [rows]; where and how it is split: as in `split`."""
    if len(set(branches)) < 2 or batch % len(branches):
        return torch.full((rows,), branches[0] if branches else CONDITIONAL)
    return torch.tensor(branches).repeat_interleave(rows // len(branches))


def grids(histogram: Tensor, low: Tensor, high: Tensor, method: str, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Scale and zero point per branch and interval, [2, I]. histogram [2, I, B] over the bins of [low, high], [I]."""
    found = [affine_grid(*search_range(branch, low, high, method, bits), bits) for branch in histogram]
    return torch.stack([scale for scale, _ in found]), torch.stack([zero for _, zero in found])


def gain(histogram: Tensor, low: Tensor, high: Tensor, method: str = "mse", bits: int = 8) -> float:
    """Squared error with a grid per branch over that with one grid for both; 1.0 where a branch never ran."""
    if not bool((histogram.flatten(1).sum(1) > 0).all()):
        return 1.0
    both = histogram.sum(0)
    joint = histogram_error(both, low, high, *affine_grid(*search_range(both, low, high, method, bits), bits), bits)
    scale, zero_point = grids(histogram, low, high, method, bits)
    apart = [histogram_error(h, low, high, s, z, bits) for h, s, z in zip(histogram, scale, zero_point, strict=True)]
    return float(sum(e[:, 0].sum() for e in apart) / joint[:, 0].sum().clamp_min(1e-30))
