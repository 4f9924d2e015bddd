"""Every operation in plain torch, exact in integers, on any device. The truth, not the fast way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats.affine import per_channel, quantize_affine, quantize_rows
from ..geometry import Codes, Geometry, StaticInput, code_sums, geglu

# A float32 holds every integer up to 2^24: 255 * 127 * 512 still fits, so chunks of 512 products add up exactly.
EXACT_CHUNK = 512


class Prepared(NamedTuple):
    """codes int8 [N, K, ...]; scale float32 [N]; sums int32 [N] of the codes per output channel."""

    codes: Tensor
    scale: Tensor
    sums: Tensor
    geometry: Geometry


def prepare(codes: Tensor, scale: Tensor, geometry: Geometry, sums: Tensor | None = None) -> Prepared:
    """sums: `code_sums`, where they are known already."""
    return Prepared(codes, scale, code_sums(codes) if sums is None else sums, geometry)


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a integer [M, K], b integer [N, K] -> int32 [M, N] = a b^T, exact."""
    if a.device.type == "cpu":
        return a.int() @ b.int().t()
    return chunked_matmul(a, b)  # no other device multiplies int32 matrices


def chunked_matmul(a: Tensor, b: Tensor) -> Tensor:
    """As `integer_matmul`, through float products short enough to be exact."""
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for k in range(0, a.shape[1], EXACT_CHUNK):
        part = a[:, k : k + EXACT_CHUNK].float() @ b[:, k : k + EXACT_CHUNK].float().t()
        out += part.to(torch.int32)
    return out


def linear_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """x float [..., K] -> [..., N] in x's dtype; x is quantized with a static affine grid."""
    return multiply(quantize_static(x, weight, grid), weight, bias)


def linear_dynamic(
    x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bias: Tensor | None, bits: int = 8
) -> Tensor:
    """x float [..., K] -> [..., N] in x's dtype; every row of x is quantized on its own affine grid.

    bits: of its codes.
    """
    return multiply(quantize_dynamic(x, weight, inverse_balance, bits), weight, bias)


def quantize_static(x: Tensor, weight: Prepared, grid: StaticInput) -> Codes:
    """The first half of `linear_static`. weight: any of those that the codes will meet."""
    q = quantize_affine(x, grid.scale, grid.zero_point, grid.inverse_balance)
    return Codes(q.reshape(-1, q.shape[-1]), grid, None, None, x.shape, x.dtype)


def quantize_dynamic(x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bits: int = 8) -> Codes:
    """The first half of `linear_dynamic`."""
    q, row_scale, row_offset = quantize_rows(x.reshape(-1, x.shape[-1]), inverse_balance, bits)
    return Codes(q, None, row_scale, row_offset, x.shape, x.dtype)


def multiply(codes: Codes, weight: Prepared, bias: Tensor | None) -> Tensor:
    """The second half of both: bit for bit what they give."""
    acc = integer_matmul(codes.values.int(), weight.codes)
    if codes.grid is not None:
        y = static_epilogue(acc, weight, codes.grid, bias)
    else:
        assert codes.scale is not None and codes.offset is not None
        y = dynamic_epilogue(acc, weight, codes.scale, codes.offset, bias)
    return y.to(codes.dtype).reshape(*codes.shape[:-1], -1)


def multiply_gated(codes: Codes, weight: Prepared, bias: Tensor | None) -> Tensor:
    """`geglu` of `multiply`: [..., N / 2]."""
    return geglu(multiply(codes, weight, bias))


def conv2d_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """x float [B, C, H, W] -> [B, N, H', W'] in x's dtype; x is quantized with a static affine grid."""
    g = weight.geometry
    inverse = None if grid.inverse_balance is None else per_channel(grid.inverse_balance, 4, 1)
    q = quantize_affine(x, grid.scale, grid.zero_point, inverse).int()
    q = F.pad(q - grid.zero_point, (g.padding[1], g.padding[1], g.padding[0], g.padding[0]))  # now 0 means zero
    height, width = g.output_size(x.shape[2], x.shape[3])
    n, c, kh, kw = g.shape
    q = q.unflatten(1, (g.groups, c))
    codes = weight.codes.reshape(g.groups, n // g.groups, c, kh, kw)
    acc = torch.zeros(x.shape[0] * height * width, n, dtype=torch.int32, device=x.device)
    for i in range(kh):
        for j in range(kw):
            top, left = i * g.dilation[0], j * g.dilation[1]
            rows = slice(top, top + g.stride[0] * (height - 1) + 1, g.stride[0])
            columns = slice(left, left + g.stride[1] * (width - 1) + 1, g.stride[1])
            tap = q[..., rows, columns].permute(1, 0, 3, 4, 2).reshape(g.groups, -1, c)
            acc += torch.cat([integer_matmul(t, w[:, :, i, j]) for t, w in zip(tap, codes, strict=True)], dim=1)
    y = acc.float() * (grid.scale * weight.scale)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(x.shape[0], height, width, n).permute(0, 3, 1, 2)


def static_epilogue(acc: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None, shift: int = 0) -> Tensor:
    """int32 products [M, N] -> float32: zero point, scales, bias. shift: what was subtracted from the codes."""
    y = (acc - (grid.zero_point - shift) * weight.sums).float() * (grid.scale * weight.scale)
    return y if bias is None else y + bias.float()


def dynamic_epilogue(
    acc: Tensor, weight: Prepared, row_scale: Tensor, row_offset: Tensor, bias: Tensor | None
) -> Tensor:
    """int32 products [M, N] -> float32: x w = (scale * q + offset) w, row by row."""
    y = acc.float() * row_scale + row_offset * weight.sums.float()
    y = y * weight.scale
    return y if bias is None else y + bias.float()
