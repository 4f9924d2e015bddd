"""Plan + calibration + float weights -> the integers: codes, scales, balance and the activation table of each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .decide import static_grid
from .observe import LayerStatistics
from .quantizer import channel_scale, per_channel, quantize_weight
from .rotation import rotate
from .scheme import STATIC, Scheme


@dataclass(frozen=True)
class LayerState:
    """One quantized layer.

    codes int8 [N, K, ...]; scale float32 [N]; balance float32 [K] or None; act_scale float32 and act_zero_point int32
    of a static activation, [I], or [2, I] with the branches apart; else None. weight = codes * scale, rotated back by
    `scheme.rotation`, / balance.
    """

    kind: str
    scheme: Scheme
    codes: Tensor
    scale: Tensor
    balance: Tensor | None
    act_scale: Tensor | None
    act_zero_point: Tensor | None

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.scale, self.balance, self.act_scale, self.act_zero_point)
        return sum(p.nbytes for p in parts if p is not None)


def solve_layer(
    scheme: Scheme,
    statistics: LayerStatistics,
    weight: Tensor,
    ranges: str,
    grid: tuple[Tensor, Tensor] | None = None,
) -> LayerState:
    """Quantize one layer. weight: float [N, K, ...], on any device; the result lies on the same device.

    grid: scale and zero point per interval of a static activation, where they were found elsewhere (`temporal.tdq`).
    Raises FloatingPointError if the weight is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise FloatingPointError("the weight holds NaN or infinite values")
    balance = statistics.balance.to(weight.device) if scheme.balanced and statistics.balance is not None else None
    balanced = weight.float() if balance is None else weight.float() * per_channel(balance, weight.dim(), 1)
    if scheme.rotation:
        balanced = rotate(balanced, scheme.rotation)
    scale = channel_scale(balanced, scheme.weight_bits)
    codes = quantize_weight(balanced, scale, scheme.weight_bits)
    act_scale = act_zero_point = None
    if scheme.activation == STATIC:
        found = grid or static_grid(statistics, ranges, scheme.activation_bits, scheme.branches)
        act_scale, act_zero_point = found
        act_scale, act_zero_point = act_scale.to(weight.device), act_zero_point.to(weight.device)
    return LayerState(statistics.kind, scheme, codes, scale, balance, act_scale, act_zero_point)
