"""What a kernel must know about a layer besides its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Geometry:
    """shape: of the weight, [N, K] or [N, C / groups, kh, kw]; the rest as in nn.Conv2d, unused by a Linear."""

    shape: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def is_conv(self) -> bool:
        return len(self.shape) == 4

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output of a convolution."""
        size = [
            (extent + 2 * p - d * (k - 1) - 1) // s + 1
            for extent, p, d, k, s in zip(
                (height, width), self.padding, self.dilation, self.shape[2:], self.stride, strict=True
            )
        ]
        return size[0], size[1]


class StaticInput(NamedTuple):
    """Grid of a static activation: tensors of one element on the device (scale float32, zero point int32), and the
    inverse balance, float32 [K], or None."""

    scale: Tensor
    zero_point: Tensor
    inverse_balance: Tensor | None


class Codes(NamedTuple):
    """A quantized input of Linear layers, for every weight of that backend with as many input channels.

    values: codes [M, K'], grid of a static activation, or scale and offset of every row, as the backend reads them.
    shape, dtype: of the input, [..., K].
    """

    values: Tensor
    grid: StaticInput | None
    scale: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype


class Norm(NamedTuple):
    """GroupNorm in front of a SiLU and a convolution. weight, bias: float [C]; the rest as in nn.GroupNorm."""

    groups: int
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x float [B, C, H, W], normalized."""
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)


def geglu(y: Tensor) -> Tensor:
    """y [..., 2 N] -> [..., N]: its first half times GELU of the second."""
    value, gate = y.chunk(2, -1)
    return value * F.gelu(gate)


def code_sums(codes: Tensor) -> Tensor:
    """codes int8 [N, K, ...] -> int32 [N], their sums per output channel."""
    return codes.flatten(1).sum(1, dtype=torch.int32)


def geometry_of(module: nn.Module) -> Geometry | str:
    """Geometry of a Linear or Conv2d, or why it has none that the kernels know."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not isinstance(module, nn.Conv2d):
        return Geometry(tuple(weight.shape))
    if module.padding_mode != "zeros":
        return f"padding mode {module.padding_mode}"
    if isinstance(module.padding, str):
        return f"padding {module.padding!r}"
    return Geometry(
        tuple(weight.shape), _pair(module.stride), _pair(module.padding), _pair(module.dilation), module.groups
    )


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return int(value[0]), int(value[1])
