"""Static grids: an activation range per interval, from the histograms of a calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.affine import affine_grid, search_range
from ..observe.statistics import LayerStatistics
from ..scheme import ONE_RANGE, TDQ


def static_grid(statistics: LayerStatistics, method: str, bits: int = 8, branches: int = 1) -> tuple[Tensor, Tensor]:
    """Scale [I] float32 and zero point [I] int32 of every interval, unvisited ones filled from their neighbours.

    With branches == 2: [2, I], for conditional and unconditional rows.
    """
    if branches == 1 or statistics.branches is None:
        return _grid(statistics, statistics.histogram, method, bits)
    found = [_grid(statistics, histogram, method, bits) for histogram in statistics.branches]
    return torch.stack([scale for scale, _ in found]), torch.stack([zero_point for _, zero_point in found])


def _grid(statistics: LayerStatistics, histogram: Tensor, method: str, bits: int) -> tuple[Tensor, Tensor]:
    method = "mse" if method in (ONE_RANGE, TDQ) else method
    low, high = search_range(histogram, statistics.bin_low, statistics.bin_high, method, bits)
    # The histogram's bins are wider than the data; never reach beyond what was seen.
    low, high = torch.maximum(low, statistics.low.clamp_max(0)), torch.minimum(high, statistics.high.clamp_min(0))
    visited = histogram.sum(1) > 0
    return affine_grid(_fill(low, visited), _fill(high, visited), bits)


def _fill(values: Tensor, visited: Tensor) -> Tensor:
    """Linear interpolation over the unvisited intervals, constant beyond the ends."""
    if not bool(visited.any()):
        return values
    known = visited.nonzero().flatten()
    out = values.clone()
    for i in (~visited).nonzero().flatten().tolist():
        below, above = known[known < i], known[known > i]
        if below.numel() and above.numel():
            a, b = int(below[-1]), int(above[0])
            out[i] = torch.lerp(values[a], values[b], (i - a) / (b - a))
        else:
            out[i] = values[int(below[-1]) if below.numel() else int(above[0])]
    return out
