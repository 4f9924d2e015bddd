"""Plan + calibration + float weights -> the integers: codes, scales, balance and the activation table of each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decide.plan import static_grid
from ..formats.affine import per_channel
from ..formats.hadamard import rotate
from ..formats.int4 import Grid, Packed, nearest, pack, search_grid, to_columns
from ..observe.model import LayerStatistics
from ..scheme import STATIC, Scheme
from .gptq8 import round_to_8_bits


@dataclass(frozen=True)
class LayerState:
    """One quantized layer.

    shape: of the weight. codes: int8 of that shape at 8 bits, packed uint8 [N, K' / 2] (`grouped`) at 4; scale float32
    [N]; factor, zero: uint8 [N, K' / group] at 4 bits, else None; balance float32 [K] or None; act_scale float32 and
    act_zero_point int32 of a static activation, [I], or [2, I] with the branches apart; else None. permutations:
    integers [1, K] or [2, K] of the rotation, or None. weight = codes * scale, rotated back by `scheme.rotation` and
    `permutations`, / balance.
    """

    kind: str
    scheme: Scheme
    shape: tuple[int, ...]
    codes: Tensor
    scale: Tensor
    balance: Tensor | None
    act_scale: Tensor | None
    act_zero_point: Tensor | None
    factor: Tensor | None = None
    zero: Tensor | None = None
    permutations: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in vars(self).values() if isinstance(part, Tensor))

    @property
    def packed(self) -> Packed | None:
        """The weight of a layer in 4 bits."""
        if self.factor is None or self.zero is None:
            return None
        return Packed(self.codes, Grid(self.scale, self.factor, self.zero, self.scheme.group), self.shape)


@dataclass(frozen=True)
class Rounded:
    """What `rounding` found for one layer: codes uint8 [N, K'] on a grid, the activation table where that was tuned
    too, and a few words on how it went."""

    codes: Tensor
    grid: Grid
    act_scale: Tensor | None = None
    act_zero_point: Tensor | None = None
    note: str = ""


def solve_layer(
    scheme: Scheme,
    statistics: LayerStatistics,
    weight: Tensor,
    ranges: str,
    grid: tuple[Tensor, Tensor] | None = None,
    rounded: Rounded | None = None,
) -> LayerState:
    """Quantize one layer. weight: float [N, K, ...], on any device; the result lies on the same device.

    grid: scale and zero point per interval of a static activation, where they were found elsewhere (`temporal.tdq`).
    rounded: codes that were found elsewhere; without them a weight of 4 bits is rounded to nearest.
    Raises FloatingPointError if the weight is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise FloatingPointError("the weight holds NaN or infinite values")
    device = weight.device
    balance = statistics.balance.to(device) if scheme.balanced and statistics.balance is not None else None
    balanced = as_multiplied(scheme, statistics, weight)
    act_scale = act_zero_point = None
    if scheme.activation == STATIC:
        act_scale, act_zero_point = grid or static_grid(
            statistics.under(scheme), ranges, scheme.activation_bits, scheme.branches
        )
        if rounded is not None and rounded.act_scale is not None and rounded.act_zero_point is not None:
            act_scale, act_zero_point = rounded.act_scale, rounded.act_zero_point
        act_scale, act_zero_point = act_scale.to(device), act_zero_point.to(device)
    permutations = (
        statistics.permutations.to(device) if scheme.permuted and statistics.permutations is not None else None
    )
    shape = tuple(weight.shape)
    if scheme.weight_bits == 8:
        codes, scale = round_to_8_bits(balanced, as_multiplying(scheme, statistics))
        return LayerState(
            statistics.kind, scheme, shape, codes, scale, balance, act_scale, act_zero_point, permutations=permutations
        )
    if rounded is None:
        columns = to_columns(balanced)
        found = search_grid(columns, scheme.group)
        rounded = Rounded(nearest(columns, found), found)
    at = rounded.grid
    return LayerState(
        statistics.kind, scheme, shape, pack(rounded.codes).to(device), at.scale.to(device), balance,
        act_scale, act_zero_point, at.factor.to(device), at.zero.to(device), permutations,
    )  # fmt: skip


def size_of(scheme: Scheme, statistics: LayerStatistics) -> int:
    """`LayerState.nbytes` of what `solve_layer` will make of an integer scheme."""
    channels, entries = statistics.shape[0], math.prod(statistics.shape)
    size = entries * scheme.weight_bits // 8 + 4 * channels
    if scheme.group:
        size += 2 * entries // scheme.group
    if scheme.balanced and statistics.balance is not None:
        size += statistics.balance.nbytes
    if scheme.permuted and statistics.permutations is not None:
        size += statistics.permutations.nbytes
    if scheme.activation == STATIC:
        size += 8 * len(statistics.bin_low) * scheme.branches
    return size


def as_multiplied(scheme: Scheme, statistics: LayerStatistics, weight: Tensor) -> Tensor:
    """The weight that meets the balanced, rotated input: float [N, K, ...] -> float32, same shape."""
    out = weight.float()
    if scheme.balanced and statistics.balance is not None:
        out = out * per_channel(statistics.balance.to(weight.device), weight.dim(), 1)
    permutations = statistics.permutations if scheme.permuted else None
    return rotate(out, scheme.rotation, permutations)


def as_multiplying(scheme: Scheme, statistics: LayerStatistics) -> Tensor | None:
    """The sample of the layer's input as it meets that weight: balanced and rotated, float32 [R, K'], or None."""
    if statistics.rows is None:
        return None
    rows = statistics.rows.float()
    if scheme.balanced and statistics.balance is not None:
        taps = rows.shape[1] // statistics.balance.numel()
        rows = rows / statistics.balance.to(rows.device).repeat_interleave(taps)
    permutations = statistics.permutations if scheme.permuted else None
    return rotate(rows, scheme.rotation, permutations)
