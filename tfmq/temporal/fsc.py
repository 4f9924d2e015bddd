"""A Temporal Information Block in integers, with finite-set calibration of its activations.

Its inputs form a finite set: T timesteps and nothing else. So every activation may own one scale and zero point per
timestep (FSC; TFMQ-DM, CVPR 2024, section 3.4), found by running the set once, and all errors are known exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.affine import RANGE_NORM, affine_grid
from ..timeline import TimeAxis
from .features import TemporalGraph

SHRINK = {8: (0.9, 6), 4: (0.5, 21)}  # bits -> least share of the range that is tried, number of trials
CHUNK = 256


@dataclass(frozen=True)
class FiniteSet:
    """The timesteps of a model: all of a discrete one, a dense grid of a flow model. points: float32 [T], ascending."""

    points: Tensor

    @classmethod
    def of(cls, axis: TimeAxis, count: int = 1000) -> FiniteSet:
        """`count` points from end to end; 1000 on an axis of 0 .. 999 are the integers."""
        return cls(torch.linspace(axis.low, axis.high, count, dtype=torch.float64).float())

    def index(self, t: Tensor) -> Tensor:
        """Timesteps of any shape -> number of the nearest point, int64, same shape; beyond the ends: the end."""
        points = self.points.to(t.device)
        right = torch.searchsorted(points, t.float().contiguous()).clamp(1, points.numel() - 1)
        return torch.where(t - points[right - 1] <= points[right] - t, right - 1, right)


@dataclass(frozen=True)
class QuantizedLayer:
    """One Linear of the TIB. y = act_scale * scale * sum (q - act_zero_point) (codes - zero_point) + bias.

    codes uint8 [N, K] in 0 .. 2^bits - 1; scale float32 [N]; zero_point int32 [N]; bias float32 [N] or None; act_scale
    float32 and act_zero_point int32, [T] for one grid per timestep of the finite set or [1] for one over all of them.
    """

    bits: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    act_scale: Tensor
    act_zero_point: Tensor

    @property
    def weight(self) -> Tensor:
        """The float weight that the codes stand for, float32 [N, K]."""
        return (self.codes.float() - self.zero_point.unsqueeze(1)) * self.scale.unsqueeze(1)

    @property
    def nbytes(self) -> int:
        """As stored: codes packed to their bits, zero points in one byte each."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return -(-self.codes.numel() * self.bits // 8) + 5 * self.scale.numel() + 5 * self.act_scale.numel() + bias

    def run(self, x: Tensor, index: Tensor) -> Tensor:
        """x float32 [B, K] of the timesteps number `index` [B] -> float32 [B, N]; the product is one of integers."""
        own = index if self.act_scale.numel() > 1 else torch.zeros_like(index)
        scale, zero = self.act_scale[own].unsqueeze(1), self.act_zero_point[own].unsqueeze(1)
        q = quantize_activation(x, scale, zero) - zero
        # float64 holds every integer up to 2^53, so these products and sums are exact integers (and fast everywhere).
        acc = q.double() @ (self.codes.double() - self.zero_point.double().unsqueeze(1)).t()
        y = acc.float() * (scale * self.scale)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class QuantizedTib:
    """A TIB with all layers in integers. graph: its float origin; times: the finite set of its activation grids."""

    graph: TemporalGraph
    times: FiniteSet
    layers: dict[str, QuantizedLayer]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())

    def features(self, t: Tensor) -> dict[str, Tensor]:
        """t [T] -> float32 output [T, N] of every layer; a t off the finite set takes the nearest grids."""
        index = self.times.index(t)
        return self.graph.walk(self.graph.embed(t), lambda path, x: self.layers[path].run(x, index))


def quantize_activation(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """x [B, K], scale and zero point [B, 1] -> uint8 grid numbers as int32 [B, K]."""
    return (x.float() / scale).round_().add_(zero_point).clamp_(0, 255).to(torch.int32)


def finite_set_grid(x: Tensor) -> tuple[Tensor, Tensor]:
    """FSC: inputs of a layer, float [T, K] -> scale float32 [T] and zero point int32 [T] by min-max of each timestep.

    Min-max is as good as any search here (TFMQ-DM, table of calibration methods): a row holds no outliers to cut.
    """
    return affine_grid(*torch.aminmax(x, dim=1))


def static_activation_grid(x: Tensor) -> tuple[Tensor, Tensor]:
    """One grid over all timesteps by min-max: inputs [T, K] -> scale [1], zero point [1]."""
    return affine_grid(x.min().reshape(1), x.max().reshape(1))


def weight_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Asymmetric grid per output channel with the least sum |w - q(w)|^2.4 over shrunken ranges (Q-Diffusion).

    weight float [N, K] -> scale float32 [N], zero point int32 [N], codes being 0 .. 2^bits - 1.
    """
    least, trials = SHRINK[bits]
    scales, zeros = [], []
    for rows in weight.float().split(CHUNK):
        low, high = torch.aminmax(rows, dim=1)
        best: Tensor | None = None
        for share in torch.linspace(1.0, least, trials).tolist():
            scale, zero = affine_grid(low * share, high * share, bits)
            error = (fake_quantize(rows, scale, zero, bits) - rows).abs_().pow_(RANGE_NORM).sum(1)
            if best is None:
                best, best_scale, best_zero = error, scale, zero
            else:
                better = error < best
                best = torch.where(better, error, best)
                best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        scales.append(best_scale)
        zeros.append(best_zero)
    return torch.cat(scales), torch.cat(zeros)


def weight_codes(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Round to nearest: weight [N, K] on a grid per row -> uint8 codes [N, K]."""
    codes = (weight.float() / scale.unsqueeze(1)).round_().add_(zero_point.unsqueeze(1))
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8)


def fake_quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    codes = (weight / scale.unsqueeze(1)).round_().add_(zero_point.unsqueeze(1)).clamp_(0, 2**bits - 1)
    return codes.sub_(zero_point.unsqueeze(1)).mul_(scale.unsqueeze(1))


def nearest_tib(graph: TemporalGraph, times: FiniteSet, bits: int, per_timestep: bool = False) -> QuantizedTib:
    """The plain way: weights rounded to nearest, one activation grid per layer over all t (or, on demand, FSC)."""
    weights = {}
    for path, layer in graph.layers.items():
        scale, zero = weight_grid(layer.weight, bits)
        weights[path] = (weight_codes(layer.weight, scale, zero, bits), scale, zero)
    return calibrated(graph, times, bits, weights, per_timestep)


def calibrated(
    graph: TemporalGraph,
    times: FiniteSet,
    bits: int,
    weights: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    per_timestep: bool = True,
) -> QuantizedTib:
    """Lay activation grids to given codes. weights: path -> codes, scale, zero point.

    Each layer's grid comes from what it really receives: the outputs of the quantized layers before it.
    """
    layers: dict[str, QuantizedLayer] = {}
    index = torch.arange(times.points.numel(), device=times.points.device)

    def compute(path: str, x: Tensor) -> Tensor:
        act_scale, act_zero = finite_set_grid(x) if per_timestep else static_activation_grid(x)
        codes, scale, zero = weights[path]
        layers[path] = QuantizedLayer(bits, codes, scale, zero, graph.layers[path].bias, act_scale, act_zero)
        return layers[path].run(x, index)

    graph.walk(graph.embed(times.points), compute)
    return QuantizedTib(graph, times, layers)
