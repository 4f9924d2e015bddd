"""int8 x int8 -> int32 through `torch._int_mm`: tensor cores on CUDA (sm_75+) and ROCm, a plain int8 product on CPUs.

Convolutions gather their patches as int8 and multiply once: correct everywhere, not yet the fast way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats.affine import per_channel, quantize_affine, quantize_rows
from ..geometry import Codes, Geometry, StaticInput, code_sums
from . import reference
from .int8_product import MIN_ROWS, MULTIPLE, int8_product
from .rates import Passes

PATCH_BYTES = 256 << 20  # gathered patches of one convolution at a time
# On a GPU each step is a pass. Of an input, float16: scaled (2 + 4), rounded, shifted, clamped (8 each), made a byte
# (5), flipped (2), multiplied (1, float16's 2 is not). Of a sum: written (4), shifted, made a float, scaled, biased (8
# each), made a float16 (4, its 2 bytes apart). A patch: written and read.
PASSES = Passes(36.0, 40.0, 2.0)


class Prepared(NamedTuple):
    """codes: int8 [N', K'], one row per output channel in the order of the gathered patches, padded with zeros."""

    codes: Tensor
    scale: Tensor
    sums: Tensor
    geometry: Geometry


def prepare(codes: Tensor, scale: Tensor, geometry: Geometry, sums: Tensor | None = None) -> Prepared:
    """As `reference.prepare`."""
    flat = codes.permute(0, 2, 3, 1).reshape(codes.shape[0], -1) if geometry.is_conv else codes
    sums = code_sums(codes) if sums is None else sums
    rows, columns = -flat.shape[0] % MULTIPLE, -flat.shape[1] % MULTIPLE
    if rows or columns:
        flat = F.pad(flat, (0, columns, 0, rows))
    return Prepared(flat.contiguous(), scale, sums, geometry)


def matmul(q: Tensor, weight: Prepared) -> Tensor:
    """q int8 [M, K] -> int32 [M, N]."""
    m, k = q.shape
    pad_rows, pad_columns = max(0, MIN_ROWS - m), weight.codes.shape[1] - k
    if pad_rows or pad_columns:
        q = F.pad(q, (0, pad_columns, 0, pad_rows))
    return int8_product(q.contiguous(), weight.codes)[:m, : weight.sums.shape[0]]


def linear_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """As `reference.linear_static`."""
    return multiply(quantize_static(x, weight, grid), weight, bias)


def linear_dynamic(
    x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bias: Tensor | None, bits: int = 8
) -> Tensor:
    """As `reference.linear_dynamic`."""
    return multiply(quantize_dynamic(x, weight, inverse_balance, bits), weight, bias)


def quantize_static(x: Tensor, weight: Prepared, grid: StaticInput) -> Codes:
    """As `reference.quantize_static`."""
    q = _signed(quantize_affine(x, grid.scale, grid.zero_point, grid.inverse_balance))
    return Codes(q.reshape(-1, q.shape[-1]), grid, None, None, x.shape, x.dtype)


def quantize_dynamic(x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bits: int = 8) -> Codes:
    """As `reference.quantize_dynamic`."""
    q, row_scale, row_offset = quantize_rows(x.reshape(-1, x.shape[-1]), inverse_balance, bits)
    return Codes(q, None, row_scale, row_offset, x.shape, x.dtype)


def multiply(codes: Codes, weight: Prepared, bias: Tensor | None) -> Tensor:
    """As `reference.multiply`."""
    acc = matmul(codes.values, weight)
    if codes.grid is not None:
        y = reference.static_epilogue(acc, _plain(weight), codes.grid, bias, shift=128)
    else:
        assert codes.scale is not None and codes.offset is not None
        y = reference.dynamic_epilogue(acc, _plain(weight), codes.scale, codes.offset, bias)
    return y.to(codes.dtype).reshape(*codes.shape[:-1], -1)


def conv2d_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """As `reference.conv2d_static`; groups == 1. The result is in channels_last order."""
    g = weight.geometry
    inverse = None if grid.inverse_balance is None else per_channel(grid.inverse_balance, 4, 1)
    q = _signed(quantize_affine(x, grid.scale, grid.zero_point, inverse)).permute(0, 2, 3, 1)
    height, width = g.output_size(x.shape[2], x.shape[3])
    if any(g.padding):
        q = _pad(q, g.padding, (grid.zero_point - 128).to(torch.int8))
    out = torch.empty(x.shape[0], height, width, g.shape[0], dtype=x.dtype, device=x.device)
    per_image = height * width * weight.codes.shape[1]
    step = max(1, PATCH_BYTES // max(per_image, 1))
    for start in range(0, x.shape[0], step):
        patches = _patches(q[start : start + step], g, height, width)
        y = reference.static_epilogue(matmul(patches, weight), _plain(weight), grid, bias, shift=128)
        out[start : start + step] = y.reshape(-1, height, width, g.shape[0])
    return out.permute(0, 3, 1, 2)


def _signed(q: Tensor) -> Tensor:
    return (q ^ 128).view(torch.int8)  # flipping the top bit subtracts 128


def _plain(weight: Prepared) -> reference.Prepared:
    return reference.Prepared(weight.codes, weight.scale, weight.sums, weight.geometry)


def _pad(q: Tensor, padding: tuple[int, int], value: Tensor) -> Tensor:
    """Pad NHWC codes with the zero point; a device tensor, so F.pad's Python number will not do."""
    b, h, w, c = q.shape
    out = value.expand(b, h + 2 * padding[0], w + 2 * padding[1], c).contiguous()
    out[:, padding[0] : padding[0] + h, padding[1] : padding[1] + w] = q
    return out


def _patches(q: Tensor, g: Geometry, height: int, width: int) -> Tensor:
    """Padded NHWC codes -> [B * H' * W', kh * kw * C]."""
    _, _, kh, kw = g.shape
    taps = []
    for i in range(kh):
        for j in range(kw):
            top, left = i * g.dilation[0], j * g.dilation[1]
            rows = slice(top, top + g.stride[0] * (height - 1) + 1, g.stride[0])
            columns = slice(left, left + g.stride[1] * (width - 1) + 1, g.stride[1])
            taps.append(q[:, rows, columns])
    return torch.cat(taps, dim=3).reshape(-1, kh * kw * q.shape[3])
