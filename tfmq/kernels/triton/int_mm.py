"""torch's int8 product between two Triton kernels of ours, for GPUs for which Triton makes no int8 product (7.5).

One launch quantizes, cuBLAS multiplies, one launch finishes: scales, zero point, bias. A convolution gathers its
patches as int8 in between. Under torch.compile the plain functions of `int_mm` run, which Inductor fuses
around the product itself.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ...geometry import Codes, Geometry, StaticInput
from .. import int_mm
from ..int8_product import int8_product
from ..int_mm import MIN_ROWS, MULTIPLE, PATCH_BYTES
from ..rates import Passes, gathers, no_int8
from . import backend as triton_backend

if TYPE_CHECKING:
    from .launch import Prepared, Rows

# A code is read as float16 (2), written and read by the product (1 + 1), whose float16 input of 2 is not; a sum is
# written and read (4 + 4); an entry of a patch is written and read (1 + 1).
PASSES = Passes(2.0, 8.0, 2.0)


@lru_cache
def missing(device: torch.device) -> str | None:
    """Why this device cannot run these operations as far as is known without a trial, or None."""
    reason = no_int8(device)
    if reason is None and torch.cuda.get_device_capability(device) >= triton_backend.CAPABILITY:
        reason = "Triton makes int8 products for this GPU itself"
    return reason or triton_backend.unusable()


def prepare(codes: Tensor, scale: Tensor, geometry: Geometry, sums: Tensor | None = None) -> Prepared:
    """As `backend.prepare`, with rows of zeros up to a multiple of 8."""
    ready = triton_backend.prepare(codes, scale, geometry, sums)
    more = -codes.shape[0] % MULTIPLE
    return ready._replace(codes=F.pad(ready.codes, (0, 0, 0, more))) if more else ready


def view(weight: Prepared) -> Tensor:
    """As `backend.view`."""
    return triton_backend.view(weight._replace(codes=weight.codes[: weight.scale.shape[0]]))


def linear_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """As `backend.linear_static`."""
    if torch.compiler.is_compiling():
        return int_mm.linear_static(x, _plain(weight), grid, bias)
    return multiply(quantize_static(x, weight, grid), weight, bias)


def linear_dynamic(
    x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bias: Tensor | None, bits: int = 8
) -> Tensor:
    """As `backend.linear_dynamic`."""
    if torch.compiler.is_compiling():
        return int_mm.linear_dynamic(x, _plain(weight), inverse_balance, bias, bits)
    return multiply(quantize_dynamic(x, weight, inverse_balance, bits), weight, bias)


def quantize_static(x: Tensor, weight: Prepared, grid: StaticInput) -> Codes:
    """As `backend.quantize_static`."""
    return triton_backend.quantize_static(_readable(x), weight, grid)._replace(dtype=x.dtype)


def quantize_dynamic(x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bits: int = 8) -> Codes:
    """As `backend.quantize_dynamic`."""
    return triton_backend.quantize_dynamic(_readable(x), weight, inverse_balance, bits)._replace(dtype=x.dtype)


def multiply(codes: Codes, weight: Prepared, bias: Tensor | None) -> Tensor:
    """As `reference.multiply`. Not under torch.compile."""
    from .launch import Rows

    n = weight.scale.shape[0]
    rows = None if codes.scale is None or codes.offset is None else Rows(codes.values, codes.scale, codes.offset)
    out = torch.empty(codes.values.shape[0], n, dtype=_readable_type(codes.dtype), device=codes.values.device)
    _product(codes.values, weight, codes.grid, rows, bias, out)
    return out.to(codes.dtype).view(*codes.shape[:-1], n)


def conv2d_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """As `backend.conv2d_static`; groups == 1."""
    if torch.compiler.is_compiling():
        return _plain_convolution(x, weight, grid, bias)
    from . import launch

    g = weight.geometry
    n = g.shape[0]
    height, width = g.output_size(x.shape[2], x.shape[3])
    q = launch.quantize_image(_readable(x), grid, weight.channels, g.padding)
    out = torch.empty(x.shape[0], height, width, n, dtype=_readable_type(x.dtype), device=x.device)
    step = max(1, x.shape[0])
    if gathers(g):
        step = max(1, PATCH_BYTES // max(1, height * width * weight.codes.shape[1]))
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        rows = patches(q[part], g, height, width) if gathers(g) else q[part].view(-1, weight.channels)
        _product(rows, weight, grid, None, bias, out[part].view(-1, n))
    return out.to(x.dtype).permute(0, 3, 1, 2)


def patches(q: Tensor, geometry: Geometry, height: int, width: int) -> Tensor:
    """Codes with their border, int8 [B, H', W', C], C a multiple of 8 -> int8 [B * height * width, kh * kw * C].

    One copy, of eight codes at a time.
    """
    wide = q.view(torch.int64)
    images, rows, columns, channels = wide.stride()
    (_, _, kh, kw), (down, right), (apart_down, apart_right) = geometry.shape, geometry.stride, geometry.dilation
    size = q.shape[0], height, width, kh, kw, wide.shape[3]
    strides = images, rows * down, columns * right, rows * apart_down, columns * apart_right, channels
    gathered = wide.as_strided(size, strides, wide.storage_offset()).contiguous()
    return gathered.view(q.shape[0] * height * width, -1).view(torch.int8)


def _product(
    q: Tensor, weight: Prepared, grid: StaticInput | None, rows: Rows | None, bias: Tensor | None, out: Tensor
) -> None:
    """q int8 [M, K'] -> out [M, N], both contiguous."""
    from . import launch

    m, n = out.shape
    if m == 0:
        return
    if m < MIN_ROWS:
        q = F.pad(q, (0, 0, 0, MIN_ROWS - m))
    sums = int8_product(q, weight.codes)[:m, :n].contiguous()
    launch.finish(sums, weight, grid, rows, None if bias is None else _readable(bias), out)


def _readable_type(dtype: torch.dtype) -> torch.dtype:
    """Triton 3.2 makes no code for bfloat16 on 7.5, where it is slow anyway."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _readable(x: Tensor) -> Tensor:
    return x.to(_readable_type(x.dtype))


def _plain(weight: Prepared) -> int_mm.Prepared:
    return int_mm.Prepared(weight.codes, weight.scale, weight.sums, weight.geometry)


def _plain_convolution(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    more = weight.channels - x.shape[1]
    if more:
        x = F.pad(x, (0, 0, 0, 0, 0, more))
        inverse = grid.inverse_balance
        grid = grid._replace(inverse_balance=None if inverse is None else F.pad(inverse, (0, more)))
    return int_mm.conv2d_static(x, _plain(weight), grid, bias)
