"""Activation ranges as a learned smooth function of time (TDQ: Temporal Dynamic Quantization, 2306.02316).

The paper trains one small network per activation that maps an embedding of t to the step size, and reads a table of it
at run time, so that it costs nothing there. Here it is trained after the calibration, on its histograms: the network
gives both ends of the range (so scale and zero point of an affine grid), and its loss is the error |x - q(x)|^2.4 that
it is expected to make on the histogram of every interval. All layers train at once.

The alternatives that it is measured against are here too: one range for all of time, one per interval
(`decide.grids`), and a range per token (as the calibration observed it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats.affine import RANGE_NORM, affine_grid, bin_centers, search_range
from ..observe.calibration import Calibration
from ..observe.statistics import LayerStatistics
from ..scheme import ONE_RANGE, STATIC, TDQ, Plan
from ..temporal.features import sinusoid
from ..timeline import Partition
from .candidates import dynamic_error
from .grids import Grid, grid_error, static_grid

CHANNELS, WIDTH, DEPTH = 32, 64, 3  # of the embedding of t; of the hidden layers; how many (paper: 4 layers are best)
BINS = 256
STEPS, RATE = 400, 5e-3
MAX_PERIOD = 200.0  # in intervals: nothing in the embedding turns faster than one radian per interval


@dataclass(frozen=True)
class TimeRanges:
    """The trained networks of all layers. paths: their order; intervals: of the calibration that they learnt from;
    parameters: weight [L, n, m] and bias [L, 1, n] of every network layer; unit [L]: the range that 1 is."""

    paths: tuple[str, ...]
    intervals: int
    parameters: tuple[Tensor, ...]
    unit: Tensor

    def table(self, positions: Tensor, bits: int = 8) -> dict[str, Grid]:
        """Positions on the time axis [P] (centres of the intervals of any partition) -> path -> grid per position."""
        low, high = _ranges(self.parameters, self.unit, _embed(positions, self.intervals))
        return {p: affine_grid(low[i], high[i], bits) for i, p in enumerate(self.paths)}


@dataclass(frozen=True)
class RangeErrors:
    """Relative L2 error of one layer's input under each way to choose its range; per_token is None for convolutions."""

    one: float
    intervals: float
    tdq: float
    per_token: float | None

    @property
    def best_static(self) -> str:
        """ "one", "intervals" or "tdq"."""
        return min(("one", "intervals", "tdq"), key=lambda name: getattr(self, name))


def fit(
    layers: Mapping[str, LayerStatistics],
    partition: Partition,
    bits: int = 8,
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TimeRanges:
    """Train the networks on a calibration's statistics; seconds. Works inside `torch.inference_mode`.

    Intervals that the calibration never visited have no say; the network fills them. The iterate with the least loss of
    each layer is kept. progress: called with (done, total); what it raises passes through.
    """
    paths = tuple(layers)
    if not paths:
        raise ValueError("there is no layer to fit ranges to")
    with torch.inference_mode(False), torch.enable_grad():
        counts, centers = _merged([layers[p] for p in paths])
        energy = (counts * centers.abs().pow(RANGE_NORM)).sum((1, 2)).clamp_min(1e-30)
        start = [one_range(layers[p], "mse", bits) for p in paths]
        low, high = (torch.cat(ends) for ends in zip(*start, strict=True))
        unit = (high - low).clamp_min(1e-12)
        parameters = _initial(len(paths), -low / unit, high / unit, seed)
        embedded = _embed(torch.tensor(partition.centers), partition.count)
        optimizer = torch.optim.Adam(parameters, lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        best = torch.full((len(paths),), float("inf"))
        kept = [p.detach().clone() for p in parameters]
        for step in range(steps + 1):
            bottom, top = _ranges(parameters, unit, embedded)
            loss = _expected_error(counts, centers, bottom, top, bits) / energy
            better = loss.detach() < best
            best = torch.where(better, loss.detach(), best)
            for old, new in zip(kept, parameters, strict=True):
                old[better] = new.detach()[better]
            if step == steps:
                break
            optimizer.zero_grad()
            # Each layer's own parameters see its own loss alone; the log makes all of them equally eager.
            loss.clamp_min(1e-12).log().sum().backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, steps)
    return TimeRanges(paths, partition.count, tuple(kept), unit.detach())


def one_range(
    statistics: LayerStatistics, method: str = "mse", bits: int = 8, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One range for all of time from the pooled histograms: low, high, float32 [1].

    weights: share of each interval [I] in the pool (the density of a calibration's timesteps); by default as counted.
    """
    low, high = statistics.bin_low.double().min(), statistics.bin_high.double().max()
    counts = statistics.histogram.double()
    if weights is not None:
        counts = counts / counts.sum(1, keepdim=True).clamp_min(1) * weights.double().unsqueeze(1)
        counts = counts / counts[counts > 0].min().clamp_min(1e-9) if bool((counts > 0).any()) else counts
    bins = 2 * counts.shape[1]
    place = (bin_centers(counts, statistics.bin_low, statistics.bin_high) - low) / (high - low).clamp_min(1e-30) * bins
    pooled = torch.zeros(bins, dtype=torch.float64)
    pooled.scatter_add_(0, place.long().clamp_(0, bins - 1).flatten(), counts.flatten())
    a, b = search_range(pooled.unsqueeze(0), low.reshape(1), high.reshape(1), method, bits)
    seen = (counts.sum(1) > 0) & torch.isfinite(statistics.low)
    if bool(seen.any()):
        a = torch.maximum(a, statistics.low[seen].min().clamp_max(0))
        b = torch.minimum(b, statistics.high[seen].max().clamp_min(0))
    return a, b


def one_grid(statistics: LayerStatistics, method: str = "mse", bits: int = 8, weights: Tensor | None = None) -> Grid:
    """`one_range` as a table: the same grid for every interval."""
    scale, zero = affine_grid(*one_range(statistics, method, bits, weights), bits)
    count = statistics.histogram.shape[0]
    return scale.repeat(count), zero.repeat(count)


def over_time(plan: Plan, calibration: Calibration) -> dict[str, Grid]:
    """Grids of the static layers of a plan whose recipe asks for "tdq" or "one range"; empty for any other recipe."""
    ranges, bits = plan.recipe.ranges, plan.recipe.activation_bits
    own = {p: calibration.layers[p].under(s) for p, s in plan.layers.items() if s.activation == STATIC}
    if ranges == ONE_RANGE:
        return {p: one_grid(s, bits=bits) for p, s in own.items()}
    if ranges != TDQ or not own:
        return {}
    # Layers that read one tensor have the same statistics, and are to have the same grids.
    first: dict[bytes, str] = {}
    same = {path: first.setdefault(_digest(s), path) for path, s in own.items()}
    learnt = fit({path: own[path] for path in first.values()}, calibration.partition, bits)
    table = learnt.table(torch.tensor(calibration.partition.centers), bits)
    return {path: (table[other][0].clone(), table[other][1].clone()) for path, other in same.items()}


def _digest(statistics: LayerStatistics) -> bytes:
    """Of all that a range is learnt from."""
    s, digest = statistics, hashlib.blake2b()
    for tensor in (s.histogram, s.bin_low, s.bin_high, s.low, s.high):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.digest()


def compare(
    layers: Mapping[str, LayerStatistics],
    ranges: TimeRanges,
    partition: Partition,
    bits: int = 8,
    method: str = "mse",
    judge: Mapping[str, LayerStatistics] | None = None,
) -> dict[str, RangeErrors]:
    """Path -> errors of the four ways, all learnt from `layers`.

    judge: statistics of other samples with the same balance vectors; without them the errors are those on the
    calibration itself, which flatter the ways with the most freedom.
    """
    learnt = ranges.table(torch.tensor(partition.centers), bits)
    out = {}
    for path in ranges.paths:
        own, seen = layers[path], (judge or layers).get(path)
        if seen is None:
            continue
        out[path] = RangeErrors(
            grid_error(seen, one_grid(own, method, bits), bits),
            grid_error(seen, static_grid(own, method, bits), bits),
            grid_error(seen, learnt[path], bits),
            dynamic_error(seen, bits) if bool(seen.row_error.sum(0)[1] > 0) else None,  # not observed in convolutions
        )
    return out


def _embed(positions: Tensor, intervals: int) -> Tensor:
    return sinusoid(positions.float() * intervals, CHANNELS, MAX_PERIOD)


def _initial(layers: int, low: Tensor, high: Tensor, seed: int) -> list[Tensor]:
    """He initialisation, the last layer at zero and its bias such that every network starts as the one static range."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [CHANNELS, *[WIDTH] * DEPTH]
    parameters = []
    for m, n in pairwise(sizes):
        parameters.append(torch.randn(layers, n, m, generator=generator) * (2 / m) ** 0.5)
        parameters.append(torch.zeros(layers, 1, n))
    parameters.append(torch.zeros(layers, 2, WIDTH))
    ends = torch.stack([low, high], dim=1).clamp_min(1e-4)
    parameters.append((ends + torch.log(-torch.expm1(-ends))).unsqueeze(1))  # the inverse of softplus
    return [p.requires_grad_() for p in parameters]


def _ranges(parameters: tuple[Tensor, ...] | list[Tensor], unit: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
    """Embedded positions [P, C] -> low, high [L, P] with low <= 0 <= high."""
    x = embedded.expand(unit.numel(), -1, -1)
    last = len(parameters) // 2 - 1
    for i in range(last + 1):
        x = torch.baddbmm(parameters[2 * i + 1], x, parameters[2 * i].transpose(1, 2))
        x = F.relu(x) if i < last else F.softplus(x)
    x = x * unit.reshape(-1, 1, 1)
    return -x[..., 0], x[..., 1]


def _expected_error(counts: Tensor, centers: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Expected |x - q(x)|^2.4 [L]: uniform rounding inside the range, the distance to its end outside. The exponent is
    that of the range search (`affine.RANGE_NORM`), so that both aim at the same."""
    low, high = low.unsqueeze(2), high.unsqueeze(2)
    beyond = F.relu(low - centers) + F.relu(centers - high)
    rounding = ((high - low) / (2**bits - 1) / 2).pow(RANGE_NORM) / (RANGE_NORM + 1)
    return (counts * (beyond.pow(RANGE_NORM) + rounding)).sum((1, 2))


def _merged(layers: list[LayerStatistics]) -> tuple[Tensor, Tensor]:
    """Histograms and places of the bins of all layers, with fewer bins, float32 [L, I, B]; counts as shares."""
    counts, centers = [], []
    for s in layers:
        wide = s.histogram.float().unflatten(1, (BINS, -1))
        at = bin_centers(s.histogram, s.bin_low, s.bin_high).float().unflatten(1, (BINS, -1))
        merged = wide.sum(2)
        # A place only says how far a value lies outside of a range, so a bin stands where its outermost values are: an
        # end that cuts a little of it off must not look free.
        outer = torch.where(wide > 0, at, -torch.inf).amax(2)
        inner = torch.where(wide > 0, at, torch.inf).amin(2)
        place = torch.where(outer > 0, outer, inner)
        centers.append(torch.where(merged > 0, place, at.mean(2)))
        counts.append(merged / merged.sum().clamp_min(1))
    return torch.stack(counts), torch.stack(centers)
