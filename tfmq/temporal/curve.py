"""Temporal features without the weights that make them: a curve over the whole time axis, saved in their place.

Where the features depend on t alone, f: t -> features is one curve in a space of many dimensions, and there are several
ways to write it down. All are tried, each is measured at every timestep (of a continuous axis: on a dense grid and half
way between its points), and the smallest that keeps the tolerance is taken:

- grid: rows at evenly spaced knots, cubic interpolation between them (four-point Lagrange);
- low rank: the best basis of r directions (singular vectors of the curve, all layers sharing the coefficients) and the
  coefficients of every timestep, with cubic interpolation between the timesteps of a continuous axis;
- rows: every timestep of a discrete axis as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import TfmqError
from ..timeline import TimeAxis

GRID, LOW_RANK, ROWS = "grid", "low rank", "rows"
KNOTS = (33, 65, 129, 257, 513)
RANKS = (4, 8, 16, 32, 64, 128, 256)
POINTS = 1000
TOLERANCE = 2e-3
STORED = torch.float16

Layers = Mapping[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Curve:
    """kind: one of GRID, LOW_RANK, ROWS. times: float32 [G], the timesteps of the knots, ascending.

    rows: path -> [G, N], or [r, N] of LOW_RANK; coefficients: float32 [G, r] of LOW_RANK. worst_error, mean_error: of
    || f' - f || / || f || over all layers and judged timesteps. trials: all that was tried, for people to read.
    """

    kind: str
    axis: TimeAxis
    times: Tensor
    rows: dict[str, Tensor]
    coefficients: Tensor | None
    worst_error: float
    mean_error: float
    trials: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        own = sum(rows.nbytes for rows in self.rows.values()) + self.times.nbytes
        return own + (0 if self.coefficients is None else self.coefficients.nbytes)

    def at(self, t: Tensor) -> dict[str, Tensor]:
        """t [B] -> float32 features [B, N] of every layer. Raises TfmqError for a t outside the axis."""
        t = t.float()
        span = self.axis.high - self.axis.low
        if bool((t < self.axis.low - 1e-4 * span).any()) or bool((t > self.axis.high + 1e-4 * span).any()):
            beyond = float(t.max() if t.max() > self.axis.high else t.min())
            raise TfmqError(
                f"Timestep {beyond:g} lies outside of the span that the temporal curve was made for "
                f"({self.axis.low:g} .. {self.axis.high:g}): use the model's own sampling."
            )
        position = _position(t, self.axis, self.times.numel())
        if self.coefficients is None:
            return {path: _interpolated(rows, position) for path, rows in self.rows.items()}
        share = _interpolated(self.coefficients, position)
        return {path: share @ basis.float() for path, basis in self.rows.items()}

    def manifest(self) -> dict[str, Any]:
        """What a file says about its curve."""
        return {
            "kind": self.kind,
            "axis": [self.axis.low, self.axis.high],
            "points": self.times.numel(),
            "rank": 0 if self.coefficients is None else self.coefficients.shape[1],
            "worst_error": self.worst_error,
            "mean_error": self.mean_error,
            "bytes": self.nbytes,
        }

    def tensors(self) -> dict[str, Tensor]:
        """For a file; `from_tensors` is the way back."""
        out = {f"rows:{path}": rows for path, rows in self.rows.items()} | {"times": self.times}
        return out if self.coefficients is None else out | {"coefficients": self.coefficients}

    @classmethod
    def from_tensors(cls, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Curve:
        """Raises TfmqError where something is missing."""
        try:
            rows = {key.removeprefix("rows:"): value for key, value in tensors.items() if key.startswith("rows:")}
            return cls(
                manifest["kind"], TimeAxis(*manifest["axis"]), tensors["times"], rows, tensors.get("coefficients"),
                manifest["worst_error"], manifest["mean_error"],
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise TfmqError("The temporal curve in this file is damaged: get or make the file again.") from error


def fit(
    layers: Layers,
    axis: TimeAxis,
    *,
    discrete: bool,
    points: int = POINTS,
    tolerance: float = TOLERANCE,
    progress: Callable[[int, int], None] | None = None,
) -> Curve:
    """The smallest curve whose worst error is within `tolerance`, or the one with the least error where none is.

    layers: path -> t [T] -> features [T, N]. discrete: whether `points` evenly spaced timesteps are
    all that there are; a continuous axis is judged half way between them too. progress: called with (done, total).
    """
    times = torch.linspace(axis.low, axis.high, points, dtype=torch.float64).float()
    judged = times if discrete else torch.linspace(axis.low, axis.high, 2 * points - 1, dtype=torch.float64).float()
    done, total = 0, 3 * len(layers)

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    coefficients = _coefficients(layers, times, tell)
    tries = [(GRID, g) for g in KNOTS if g < points]
    tries += [(LOW_RANK, r) for r in RANKS if r <= coefficients.shape[1]]
    tries.append((ROWS, points))  # on a continuous axis: the densest grid
    worst, mean, size = ([0.0] * len(tries) for _ in range(3))
    for feature in layers.values():
        truth, rows = feature(judged), feature(times)
        for i, (kind, number) in enumerate(tries):
            own = feature(_knots(axis, number)) if kind == GRID else rows
            trial = _one(kind, number, axis, times, own, coefficients)
            norm = truth.norm(dim=1).clamp_min(1e-12)
            found = trial.at(judged)[""]
            error = (found - truth).norm(dim=1) / norm
            worst[i] = max(worst[i], float(error.max()))
            mean[i] += float(error.mean()) / len(layers)
            size[i] += trial.rows[""].nbytes
        tell()
    trials: list[dict[str, Any]] = []
    for i, (kind, number) in enumerate(tries):
        size[i] += 4 * points * (number + 1) if kind == LOW_RANK else 4 * number
        trials.append(
            {
                "kind": kind,
                "number": number,
                "worst_error": worst[i],
                "mean_error": mean[i],
                "bytes": int(size[i]),
            }
        )
    good = [i for i in range(len(tries)) if worst[i] <= tolerance]
    best = min(good, key=lambda i: size[i]) if good else min(range(len(tries)), key=lambda i: worst[i])
    kind, number = tries[best]
    knots = _knots(axis, number) if kind == GRID else times
    rows_of = {}
    for path, feature in layers.items():
        rows_of[path] = _one(kind, number, axis, times, feature(knots), coefficients).rows[""]
        tell()
    shares = coefficients[:, :number].contiguous() if kind == LOW_RANK else None
    return Curve(kind, axis, knots, rows_of, shares, worst[best], mean[best], trials)


def _coefficients(layers: Layers, times: Tensor, tell: Callable[[], None]) -> Tensor:
    """Left singular vectors of the curve [T, D] of all layers, as float32 [T, r], by falling singular value. They come
    from the T x T matrix of inner products, to which every layer adds its share alone."""
    gram = torch.zeros(times.numel(), times.numel(), dtype=torch.float64)
    for feature in layers.values():
        rows = feature(times).double()
        gram += rows @ rows.t() / rows.square().sum().clamp_min(1e-30)
        tell()
    _, vectors = torch.linalg.eigh(gram)
    return (vectors.flip(1)[:, : max(RANKS)] * times.numel() ** 0.5).float()


def _one(kind: str, number: int, axis: TimeAxis, times: Tensor, rows: Tensor, coefficients: Tensor) -> Curve:
    """The curve of one layer (path ""), rows [G, N] being its features at the knots."""
    if kind != LOW_RANK:
        times = _knots(axis, number)
        return Curve(kind, axis, times, {"": rows.to(STORED)}, None, 0.0, 0.0)
    own = coefficients[:, :number]
    basis = own.t() @ rows / times.numel()
    return Curve(kind, axis, times, {"": basis.to(STORED)}, own.contiguous(), 0.0, 0.0)


def _knots(axis: TimeAxis, count: int) -> Tensor:
    return torch.linspace(axis.low, axis.high, count, dtype=torch.float64).float()


def _position(t: Tensor, axis: TimeAxis, count: int) -> Tensor:
    """Timesteps -> float64 place among `count` evenly spaced knots, 0 .. count - 1."""
    place = (t.double() - axis.low) / (axis.high - axis.low) * (count - 1)
    place = place.clamp(0, count - 1)
    # A timestep that is a knot gives the knot's own row, to the bit.
    near = place.round()
    return torch.where((place - near).abs() < 1e-4, near, place)


def _interpolated(rows: Tensor, position: Tensor) -> Tensor:
    """rows [G, N] at fractional places [B] -> float32 [B, N], cubic where there are four rows, else linear."""
    count = rows.shape[0]
    nodes = min(4, count)
    start = (position.floor().long() - 1).clamp(0, count - nodes)
    u = position - start
    out = torch.zeros(position.numel(), rows.shape[1], dtype=torch.float32)
    for j in range(nodes):
        weight = torch.ones_like(u)
        for k in range(nodes):
            if k != j:
                weight = weight * (u - k) / (j - k)
        out += weight.float().unsqueeze(1) * rows[start + j].float()
    return out
