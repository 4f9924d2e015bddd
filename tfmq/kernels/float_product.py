"""Linear layers in float from integer codes, for GPUs where no integer product is as fast as the one in 16 bit.

As `float_conv`: the weight is turned back into floats at every call and stays in memory as codes, and the activation
is not quantized, so that the result is nearer to the float layer's than an integer kernel's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats.affine import per_channel
from ..geometry import Codes, Geometry, StaticInput

IN_FLOAT = True  # an input that is rotated first may stay in its own float type


class Prepared(NamedTuple):
    """codes int8 [N, K], scale float32 [N]."""

    codes: Tensor
    scale: Tensor


def prepare(codes: Tensor, scale: Tensor, geometry: Geometry, sums: Tensor | None = None) -> Prepared:
    """geometry, sums: not used."""
    return Prepared(codes.contiguous(), scale)


def view(weight: Prepared) -> Tensor:
    """The codes that `prepare` was given, in the memory of `weight`."""
    return weight.codes


def linear_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """x float [..., K] -> [..., N] in x's dtype; of the grid only the balance counts."""
    return _product(x, weight, grid.inverse_balance, bias)


def linear_dynamic(
    x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bias: Tensor | None, bits: int = 8
) -> Tensor:
    """As `linear_static`; bits: not used."""
    return _product(x, weight, inverse_balance, bias)


def quantize_static(x: Tensor, weight: Prepared, grid: StaticInput) -> Codes:
    """Nothing is quantized: the values of the codes are x [M, K]."""
    return Codes(x.reshape(-1, x.shape[-1]), grid, None, None, x.shape, x.dtype)


def quantize_dynamic(x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bits: int = 8) -> Codes:
    """As `quantize_static`; the inverse balance is where a scale would be."""
    return Codes(x.reshape(-1, x.shape[-1]), None, inverse_balance, None, x.shape, x.dtype)


def multiply(codes: Codes, weight: Prepared, bias: Tensor | None) -> Tensor:
    """The second half of both: bit for bit what they give."""
    inverse = codes.scale if codes.grid is None else codes.grid.inverse_balance
    return _product(codes.values, weight, inverse, bias).view(*codes.shape[:-1], -1)


def _product(x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bias: Tensor | None) -> Tensor:
    w = decode(weight.codes, weight.scale, inverse_balance, x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def decode(codes: Tensor, scale: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
    """codes int8 [N, K, ...] times scale float32 [N] and, where given, columns (float32, to broadcast over one row of
    codes) -> `dtype`, computed in float32 and rounded once; in memory as the codes."""
    scale = per_channel(scale, codes.dim())
    out = torch.empty_like(codes, dtype=dtype)
    if codes.device.type != "cuda" or torch.compiler.is_compiling():  # elsewhere an `out` of its own type is a detour
        w = codes.float().mul_(scale)
        return (w if columns is None else w.mul_(columns)).to(dtype)
    # On CUDA one pass reads codes and writes `dtype`: 3 bytes an entry, where the three above move 19.
    if columns is None:
        return torch.mul(codes, scale, out=out)
    return torch.mul(torch.mul(codes, scale), columns, out=out)
