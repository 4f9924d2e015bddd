"""One layer of the plan as reconstruction sees it: its input rounded as the real leaf rounds it, its weight decoded.

All in float, so that gradients pass; the straight-through estimator takes the place of that of a rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import int4
from ..formats.affine import dequantize_weight, per_channel, quantize_rows
from ..formats.hadamard import rotate
from ..geometry import Geometry
from ..scheme import DYNAMIC, STATIC, Scheme
from ..solve.gptq8 import round_to_8_bits
from ..state import Rounded


@dataclass(frozen=True)
class Rows:
    """What the rows of a batch are: interval and branch (`branches`), int64 [B] on the device of the model."""

    interval: Tensor
    branch: Tensor

    def __getitem__(self, rows: Tensor) -> Rows:
        return Rows(self.interval[rows], self.branch[rows])

    def to(self, device: torch.device) -> Rows:
        return Rows(self.interval.to(device), self.branch.to(device))


@dataclass
class Layer:
    """act_scale float32, act_zero_point int32 [I] or [2, I]: of a static activation. balance float32 [K] or None.
    permutations: integers [1, K] or [2, K] of the rotation, or None. sample: of what the weight is multiplied by, float
    [R, K'], of a layer in 8 bits, or None.

    `codes` uint8 [N, K'] and `grid` are set once the weight is rounded, `weight8` instead of them of a layer in 8
    bits; `ranges_tuned`: whether `act_scale` was learnt. While a unit is trained, `trained` holds its weight [N, K,
    ...], `act_scale` may carry a gradient, and the weight's channels are multiplied by `gain` [N] where there is one.
    """

    scheme: Scheme
    geometry: Geometry
    bias: Tensor | None = None
    balance: Tensor | None = None
    act_scale: Tensor | None = None
    act_zero_point: Tensor | None = None
    permutations: Tensor | None = None
    sample: Tensor | None = None
    codes: Tensor | None = None
    grid: int4.Grid | None = None
    weight8: Rounded | None = None
    trained: Tensor | None = None
    gain: Tensor | None = None
    ranges_tuned: bool = False

    @property
    def solved(self) -> bool:
        return self.codes is not None or self.weight8 is not None

    def round_to_8_bits(self, weight: Tensor) -> None:
        """weight float [N, K, ...], as it meets the balanced and rotated input."""
        self.weight8 = round_to_8_bits(weight, self.sample).to("cpu")

    def weight(self, device: torch.device) -> Tensor:
        """float32 [N, K, ...], as it meets the balanced and rotated input."""
        if self.trained is not None:
            return self.trained
        if self.weight8 is not None:
            return dequantize_weight(self.weight8.codes.to(device), self.weight8.scale.to(device))
        assert self.codes is not None and self.grid is not None
        columns = int4.values(self.codes.to(device), grid_to(self.grid, device))
        return int4.from_columns(columns, self.geometry.shape)

    def plain_input(self, x: Tensor) -> Tensor:
        """x -> float32 of the same shape: balanced and rotated."""
        x = x.float()
        if self.balance is not None:
            x = x / per_channel(self.balance, x.dim(), 1 if self.geometry.is_conv else -1)
        return rotate(x, self.scheme.rotation, self.permutations)

    def quantized_input(self, x: Tensor, rows: Rows) -> Tensor:
        """x [B * m, ...] -> float32 of the same shape: balanced, rotated, and rounded to its grid."""
        x = self.plain_input(x)
        if self.scheme.activation == DYNAMIC:
            with torch.no_grad():
                flat = x.detach().reshape(-1, x.shape[-1])
                codes, scale, offset = quantize_rows(flat, bits=self.scheme.activation_bits)
                rounded = (codes * scale + offset).view(x.shape)
            return x + (rounded - x).detach() if x.requires_grad else rounded
        if self.scheme.activation == STATIC:
            return self._static(x, rows)
        return x

    def _static(self, x: Tensor, rows: Rows) -> Tensor:
        assert self.act_scale is not None and self.act_zero_point is not None
        where = (rows.interval,) if self.act_scale.dim() == 1 else (rows.branch, rows.interval)
        scale, zero = self.act_scale[where], self.act_zero_point[where].float()
        b = scale.shape[0]
        if x.shape[0] % b:  # something that is not per picture: the first row's grid must do
            scale, zero, b = scale[:1], zero[:1], 1
        scale, zero = (part.view(-1, *[1] * x.dim()) for part in (scale, zero))
        shape = x.shape
        place = (x.reshape(b, -1, *shape[1:]) / scale + zero).clamp(0, 2**self.scheme.activation_bits - 1)
        if place.requires_grad:
            place = place + (place.round() - place).detach()
        else:
            place.round_()
        return ((place - zero) * scale).view(shape)

    def compute(self, x: Tensor, rows: Rows, dtype: torch.dtype = torch.float32) -> Tensor:
        """The layer in float on its rounded input and weight; dtype: of the product."""
        return self.multiply(self.quantized_input(x, rows), dtype).to(x.dtype)

    def multiply(self, quantized: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """float32 or `dtype` out of an input that is rounded already."""
        weight, x, g = self.weight(quantized.device).to(dtype), quantized.to(dtype), self.geometry
        bias = None if self.bias is None else self.bias.to(quantized.device, dtype)
        added = bias if self.gain is None else None
        if g.is_conv:
            out = F.conv2d(x, weight, added, g.stride, g.padding, g.dilation, g.groups)
        else:
            out = F.linear(x, weight, added)
        if self.gain is None:
            return out
        # Behind the product: the weight itself needs no gradient then.
        out = out * per_channel(self.gain, out.dim(), 1 if g.is_conv else -1)
        return out if bias is None else out + per_channel(bias, out.dim(), 1 if g.is_conv else -1)


def grid_to(grid: int4.Grid, device: torch.device | str) -> int4.Grid:
    return int4.Grid(grid.scale.to(device), grid.factor.to(device), grid.zero.to(device), grid.group)
