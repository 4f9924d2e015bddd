"""Disturbance-aware selection: how each temporal feature is kept, by its measured error and its bytes.

The journal version of TFMQ-DM (Temporal Feature Matters, 2407.19547) lets the error of the temporal features decide
between quantized modules and cached features. Here the whole choice is on the table: integer weights, rows of a cache,
float weights, or weights with cached rows for those parts of the time axis where the weights do worst.

The choice is a multiple-choice knapsack: one option per layer, least total error, bytes within a budget. It is solved
by dynamic programming on bytes that are rounded up to a 1/1024 of the budget, so that the budget holds for certain. Two
properties hold by construction, not by luck: an option with more error than the layer has in the reference is no
candidate at all, and where the rounding should leave nothing better, the reference itself is taken. So no layer is ever
worse than in the reference, at equal or fewer bytes.

A projection is fitted to the embedder in front of it, so integer weights of one width come with the embedder of that
width; the choice is made for every embedder ("family") and the best is kept. With nothing but caches there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TfmqError
from ..words import counted
from .features import TemporalGraph
from .fsc import FiniteSet, QuantizedTib

FLOAT, CACHE8, CACHE16, NONE = "float weights", "cache int8", "cache float16", "none"
UNITS = 1024


@dataclass(frozen=True)
class FeatureErrors:
    """Of one layer, per interval of the time axis, lists of length I.

    rel_l2: || f_q - f || / || f || over the timesteps of the interval. cosine: the worst of a timestep. mismatch: the
    furthest that a quantized feature's nearest float feature lies from its own timestep, in units of t. squared,
    energy: numerator and denominator of rel_l2, squared. An interval without a timestep has zeros and a cosine of 1.
    """

    rel_l2: list[float]
    cosine: list[float]
    mismatch: list[float]
    squared: list[float]
    energy: list[float]

    @property
    def total_rel_l2(self) -> float:
        return (sum(self.squared) / max(sum(self.energy), 1e-30)) ** 0.5

    @property
    def worst_cosine(self) -> float:
        return min(self.cosine)

    @property
    def worst_mismatch(self) -> float:
        return max(self.mismatch)


@dataclass(frozen=True)
class Choice:
    """How one layer is maintained. base: the weights or the cache; cached: intervals whose rows come from a `rows`
    cache in place of the base; bytes: of both (an embedder's bytes are the selection's). why: one line."""

    path: str
    base: str
    rows: str
    cached: tuple[int, ...]
    bytes: int
    rel_l2: float
    worst_cosine: float
    why: str


@dataclass(frozen=True)
class Selection:
    """embedder: the family whose embedder is kept, or "none"; bytes: all of it, embedder included, <= budget.

    candidates: family or cache -> layer path -> errors. candidate_bytes: the same -> bytes, with the embedder under
    EMBEDDER.
    """

    choices: dict[str, Choice]
    embedder: str
    bytes: int
    budget: int
    reference: str
    candidates: dict[str, dict[str, FeatureErrors]]
    candidate_bytes: dict[str, dict[str, int]]


EMBEDDER = "embedder"


@dataclass(frozen=True)
class _Option:
    base: str
    rows: str
    cached: tuple[int, ...]
    bytes: int
    squared: float
    cosine: float


def feature_errors(
    reference: Tensor, found: Tensor, times: FiniteSet, interval: Tensor, intervals: int
) -> FeatureErrors:
    """Errors of features `found` [T, N] against the float ones [T, N]; interval: int64 [T], which one each t is in."""
    squared = (found - reference).double().square().sum(1)
    energy = reference.double().square().sum(1)
    cosine = torch.nn.functional.cosine_similarity(found.double(), reference.double(), dim=1)
    cosine = torch.where(energy > 0, cosine, torch.ones_like(cosine))
    nearest = torch.cdist(found.double(), reference.double()).argmin(1)
    distance = (times.points[nearest] - times.points).abs().double()
    zeros = torch.zeros(intervals, dtype=torch.float64, device=reference.device)
    e, f = zeros.scatter_add(0, interval, squared), zeros.scatter_add(0, interval, energy)
    return FeatureErrors(
        (e / f.clamp_min(1e-30)).sqrt().tolist(),
        (zeros + 1).scatter_reduce(0, interval, cosine, "amin").tolist(),
        zeros.scatter_reduce(0, interval, distance, "amax").tolist(),
        e.tolist(),
        f.tolist(),
    )


def int8_table(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An int8 cache of features [T, N]: codes uint8 [T, N], scale and low float32, [T, 1] or [1, N], with features
    about codes * scale + low. 8 bits affine, one grid per row or per column, whichever has less error."""
    best: tuple[float, tuple[Tensor, Tensor, Tensor]] | None = None
    for dim in (0, 1):
        low, high = torch.aminmax(features, dim=dim, keepdim=True)
        scale = ((high - low) / 255).clamp_min(1e-30)
        codes = ((features - low) / scale).round()
        error = float((codes * scale + low - features).double().square().sum())
        if best is None or error < best[0]:
            best = error, (codes.to(torch.uint8), scale, low)
    assert best is not None
    return best[1]


def int8_rows(features: Tensor) -> tuple[Tensor, int]:
    """What an int8 cache of features [T, N] gives back, and its bytes."""
    codes, scale, low = int8_table(features)
    return codes.float() * scale + low, codes.numel() + 8 * scale.numel()


def select(
    graph: TemporalGraph,
    times: FiniteSet,
    tibs: Mapping[str, QuantizedTib],
    *,
    reference: str,
    budget: int | None = None,
    intervals: int = 25,
    float_bytes: int = 2,
) -> Selection:
    """Choose for every output layer among `tibs` (name -> quantized TIB), both caches and the float weights.

    reference: the name of the TIB that no layer may be worse than. budget: bytes, by default the reference's; a budget
    under the reference's lifts that limit for want of a way to keep it. float_bytes: of one float weight as stored.
    Raises TfmqError if not even the smallest choice fits the budget.
    """
    if reference not in tibs:
        raise ValueError(f"the reference {reference!r} is not among {sorted(tibs)}")
    budget = tibs[reference].nbytes if budget is None else budget
    count = times.points.numel()
    interval = (torch.arange(count, device=times.points.device) * intervals // count).long()
    rows_in = torch.bincount(interval, minlength=intervals).tolist()
    floats = graph.features(times.points)
    outputs = graph.outputs

    found: dict[str, dict[str, Tensor]] = {name: tib.features(times.points) for name, tib in tibs.items()}
    sizes = {name: {p: tib.layers[p].nbytes for p in graph.layers} for name, tib in tibs.items()}
    packed = {path: int8_rows(floats[path]) for path in outputs}
    found[CACHE8] = {path: rows for path, (rows, _) in packed.items()}
    found[CACHE16] = {path: floats[path].half().float() for path in outputs}
    found[FLOAT] = floats
    sizes[CACHE8] = {path: size for path, (_, size) in packed.items()}
    sizes[CACHE16] = {path: 2 * floats[path].numel() for path in outputs}
    sizes[FLOAT] = {
        p: float_bytes * (layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel()))
        for p, layer in graph.layers.items()
    }
    errors = {
        name: {p: feature_errors(floats[p], some[p], times, interval, intervals) for p in outputs}
        for name, some in found.items()
    }
    for of in sizes.values():
        of[EMBEDDER] = sum(of.get(path, 0) for path in graph.embedder)

    keeps = budget >= tibs[reference].nbytes
    limit = {p: sum(errors[reference][p].squared) if keeps else float("inf") for p in outputs}
    best: tuple[float, str, dict[str, _Option], int] | None = None
    if keeps:
        own = {p: _plain(reference, p, errors, sizes) for p in outputs}
        best = _total(own, errors), reference, own, sizes[reference][EMBEDDER] + sum(o.bytes for o in own.values())
    for family in (*tibs, FLOAT, NONE):
        fixed = 0 if family == NONE else sizes[family][EMBEDDER]
        options = [[o for o in _options(family, p, errors, sizes, rows_in) if o.squared <= limit[p]] for p in outputs]
        picked = _knapsack(options, [sum(errors[FLOAT][p].energy) for p in outputs], budget - fixed)
        if picked is not None:
            own = dict(zip(outputs, picked, strict=True))
            total = _total(own, errors)
            if best is None or total < best[0]:
                best = total, family, own, fixed + sum(o.bytes for o in picked)
    if best is None:
        raise TfmqError(
            f"No choice for the temporal layers fits into {budget / 1e3:.1f} kB: raise the budget (budget_kb)."
        )
    _, family, own, size = best
    choices = {p: _choice(p, o, family, reference, errors, sizes) for p, o in own.items()}
    return Selection(choices, family, size, budget, reference, errors, sizes)


def _plain(
    name: str, path: str, errors: dict[str, dict[str, FeatureErrors]], sizes: dict[str, dict[str, int]]
) -> _Option:
    e = errors[name][path]
    return _Option(name, "", (), sizes[name][path], sum(e.squared), e.worst_cosine)


def _options(
    family: str,
    path: str,
    errors: dict[str, dict[str, FeatureErrors]],
    sizes: dict[str, dict[str, int]],
    rows_in: list[int],
) -> list[_Option]:
    """All ways to keep one layer behind one embedder: pure caches, weights, weights with the worst intervals cached."""
    options = [_plain(cache, path, errors, sizes) for cache in (CACHE8, CACHE16)]
    if family == NONE:
        return options
    base = _plain(family, path, errors, sizes)
    options.append(base)
    weights = errors[family][path]
    for cache in (CACHE8, CACHE16):
        rows = errors[cache][path]
        gains = [w - c for w, c in zip(weights.squared, rows.squared, strict=True)]
        order = sorted((i for i, g in enumerate(gains) if g > 0), key=lambda i: gains[i] / rows_in[i], reverse=True)
        per_row = sizes[cache][path] / sum(rows_in)
        cached: tuple[int, ...] = ()
        size, squared = float(base.bytes), base.squared
        for i in order:
            cached = (*cached, i)
            size += per_row * rows_in[i]
            squared -= gains[i]
            cosine = min((rows if j in cached else weights).cosine[j] for j in range(len(rows_in)))
            options.append(_Option(family, cache, tuple(sorted(cached)), int(size) + 1, squared, cosine))
    return options


def _knapsack(options: list[list[_Option]], energies: list[float], budget: int) -> list[_Option] | None:
    """One option per layer with the least sum of squared / energy within `budget` bytes, or None."""
    if budget <= 0 or any(not some for some in options):
        return None
    unit = budget / UNITS
    least = torch.zeros(UNITS + 1, dtype=torch.float64)
    taken: list[Tensor] = []
    for some, energy in zip(options, energies, strict=True):
        trials = torch.full((len(some), UNITS + 1), float("inf"), dtype=torch.float64)
        for i, option in enumerate(some):
            cost = -int(-option.bytes // unit)
            if cost <= UNITS:
                trials[i, cost:] = least[: UNITS + 1 - cost] + option.squared / max(energy, 1e-30)
        least, best = trials.min(0)
        taken.append(best)
    if not bool(torch.isfinite(least[UNITS])):
        return None
    place, picked = UNITS, []
    for some, best in zip(reversed(options), reversed(taken), strict=True):
        option = some[int(best[place])]
        picked.append(option)
        place -= -int(-option.bytes // unit)
    return picked[::-1]


def _total(own: dict[str, _Option], errors: dict[str, dict[str, FeatureErrors]]) -> float:
    return sum(o.squared / max(sum(errors[FLOAT][p].energy), 1e-30) for p, o in own.items())


def _choice(
    path: str,
    option: _Option,
    family: str,
    reference: str,
    errors: dict[str, dict[str, FeatureErrors]],
    sizes: dict[str, dict[str, int]],
) -> Choice:
    rel = (option.squared / max(sum(errors[FLOAT][path].energy), 1e-30)) ** 0.5
    against = errors[reference][path]
    why = (
        f"error {rel:.1e} in {option.bytes} bytes; {reference} has {against.total_rel_l2:.1e} in "
        f"{sizes[reference][path]} bytes"
    )
    if option.cached:
        why += f"; rows of {counted(len(option.cached), 'interval')}, where the weights do worst, from a {option.rows}"
    why += "; no embedder of t is needed" if family == NONE else f"; embedder: {family}"
    return Choice(path, option.base, option.rows, option.cached, option.bytes, rel, option.cosine, why)
