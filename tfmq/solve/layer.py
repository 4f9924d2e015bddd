"""Plan + calibration + float weights -> the integers: codes, scales, balance and the activation table of each layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..decide.grids import static_grid
from ..formats.affine import per_channel
from ..formats.hadamard import rotate
from ..formats.int4 import nearest, pack, search_grid, to_columns
from ..observe.statistics import LayerStatistics
from ..scheme import STATIC, Scheme
from ..state import LayerState, Rounded
from .gptq8 import round_to_8_bits


def solve_layer(
    scheme: Scheme,
    statistics: LayerStatistics,
    weight: Tensor,
    ranges: str,
    grid: tuple[Tensor, Tensor] | None = None,
    rounded: Rounded | None = None,
) -> LayerState:
    """Quantize one layer. weight: float [N, K, ...], on any device; the result lies on the same device.

    grid: scale and zero point per interval of a static activation, where they were found elsewhere (`decide.tdq`).
    rounded: where the weight was rounded elsewhere; else it is here, one of 4 bits to nearest.
    Raises FloatingPointError if the weight is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise FloatingPointError("the weight holds NaN or infinite values")
    act_scale = act_zero_point = None
    if scheme.activation == STATIC:
        act_scale, act_zero_point = grid or static_grid(
            statistics.under(scheme), ranges, scheme.activation_bits, scheme.branches
        )
        if rounded is not None and rounded.act_scale is not None and rounded.act_zero_point is not None:
            act_scale, act_zero_point = rounded.act_scale, rounded.act_zero_point
    if rounded is None:
        rounded = _rounded(scheme, as_multiplied(scheme, statistics, weight), as_multiplying(scheme, statistics))
    codes = rounded.codes if scheme.weight_bits == 8 else pack(rounded.codes)
    balance, permutations = folded(scheme, statistics)
    return LayerState(
        statistics.kind, scheme, tuple(weight.shape), codes, rounded.scale, balance, act_scale, act_zero_point,
        rounded.factor, rounded.zero, permutations,
    ).to(weight.device)  # fmt: skip


def _rounded(scheme: Scheme, weight: Tensor, rows: Tensor | None) -> Rounded:
    """weight, rows: as they meet each other."""
    if scheme.weight_bits == 8:
        return round_to_8_bits(weight, rows)
    columns = to_columns(weight)
    grid = search_grid(columns, scheme.group)
    return Rounded(nearest(columns, grid), *grid)


def size_of(scheme: Scheme, statistics: LayerStatistics) -> int:
    """`LayerState.nbytes` of what `solve_layer` will make of an integer scheme."""
    channels, entries = statistics.shape[0], math.prod(statistics.shape)
    size = entries * scheme.weight_bits // 8 + 4 * channels
    if scheme.grouped:
        size += 2 * entries // scheme.group
    size += sum(part.nbytes for part in folded(scheme, statistics) if part is not None)
    if scheme.activation == STATIC:
        size += 8 * len(statistics.bin_low) * scheme.branches
    return size


def folded(scheme: Scheme, statistics: LayerStatistics) -> tuple[Tensor | None, Tensor | None]:
    """Balance and permutations of the input that are folded into the weight, where the layer has them."""
    return statistics.balance if scheme.balanced else None, statistics.permutations if scheme.permuted else None


def as_multiplied(scheme: Scheme, statistics: LayerStatistics, weight: Tensor) -> Tensor:
    """The weight that meets the balanced, rotated input: float [N, K, ...] -> float32, same shape."""
    out, (balance, permutations) = weight.float(), folded(scheme, statistics)
    if balance is not None:
        out = out * per_channel(balance.to(weight.device), weight.dim(), 1)
    return rotate(out, scheme.rotation, permutations)


def as_multiplying(scheme: Scheme, statistics: LayerStatistics) -> Tensor | None:
    """The sample of the layer's input as it meets that weight: balanced and rotated, float32 [R, K'], or None."""
    if statistics.rows is None:
        return None
    rows, (balance, permutations) = statistics.rows.float(), folded(scheme, statistics)
    if balance is not None:
        rows = rows / balance.to(rows.device).repeat_interleave(rows.shape[1] // balance.numel())
    return rotate(rows, scheme.rotation, permutations)
