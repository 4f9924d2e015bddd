"""Static grids: an activation range per interval, from the histograms of a calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.affine import affine_grid, histogram_error, search_range
from ..observe.statistics import LayerStatistics
from ..scheme import ONE_RANGE, TDQ

Grid = tuple[Tensor, Tensor]  # scale float32 [I], zero point int32 [I]


def static_grid(statistics: LayerStatistics, method: str, bits: int = 8, branches: int = 1) -> Grid:
    """Scale [I] float32 and zero point [I] int32 of every interval, unvisited ones filled from their neighbours.

    With branches == 2: [2, I], for conditional and unconditional rows.
    """
    if branches == 1 or statistics.branches is None:
        return _grid(statistics, statistics.histogram, method, bits)
    found = [_grid(statistics, histogram, method, bits) for histogram in statistics.branches]
    return torch.stack([scale for scale, _ in found]), torch.stack([zero_point for _, zero_point in found])


def grid_error(statistics: LayerStatistics, grid: Grid, bits: int = 8) -> float:
    """Relative L2 error of a table of grids on the histograms of `statistics`, over all intervals."""
    s = statistics
    sums = histogram_error(s.histogram, s.bin_low, s.bin_high, *grid, bits).sum(0)
    return float((sums[0] / sums[1].clamp_min(1e-30)).sqrt())


def _grid(statistics: LayerStatistics, histogram: Tensor, method: str, bits: int) -> Grid:
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
