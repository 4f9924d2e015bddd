"""Launches of the Triton kernels: shapes, strides and tiles worked out on the host, nothing read from the device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...geometry import Geometry, StaticInput
from ..device_time import stopwatch
from .norm import channel_statistics_kernel, group_gain_kernel
from .product import finish_kernel, product_kernel
from .quantize import quantize_kernel, quantize_rows_kernel
from .tune import Shape, Tile, Tuner, cache_file, machine

MULTIPLE = 16  # channels are padded to it: a load of 16 bytes needs an address that divides by 16
SWIZZLE = 8
LONGEST_ROW = 4096  # of what a program that takes a row holds at a time

# What another version compiles, other tiles may be quickest with.
tuner = Tuner(cache_file(), f"triton {triton.__version__}, torch {torch.__version__}")


class Prepared(NamedTuple):
    """A weight as the kernels read it. Columns in the order [kh, kw, C'], C' channels.

    codes: int8 [N, kh * kw * C'], C' a multiple of 16, zeros where there is no channel; or packed 4-bit codes, uint8
    [N, kh * kw * C / 2], with factor and zero, uint8 [N, kh * kw * C / group] (`int4.Packed`). scale float32 [N];
    sums int32 [N] of the int8 codes per output channel; group: 0 for int8 codes.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor
    factor: Tensor | None
    zero: Tensor | None
    group: int
    geometry: Geometry

    @property
    def channels(self) -> int:
        """C'."""
        taps = self.geometry.shape[2] * self.geometry.shape[3] if self.geometry.is_conv else 1
        return self.codes.shape[1] * (2 if self.group else 1) // taps


class Rows(NamedTuple):
    """Activations with a grid per row. codes int8 [M, C']; scale, offset float32 [M]: x = offset + scale * codes."""

    codes: Tensor
    scale: Tensor
    offset: Tensor


class Affine(NamedTuple):
    """What a norm comes to: x * gain + shift, both float32 [B, C]."""

    gain: Tensor
    shift: Tensor


# Triton's own are its kernels' functions as well: called on the host each takes 2 us, and a layer needs five.
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is not below n; n >= 1."""
    return 1 << (n - 1).bit_length()


def round_up(channels: int) -> int:
    return cdiv(channels, MULTIPLE) * MULTIPLE


def quantize_image(
    x: Tensor, grid: StaticInput, channels: int, padding: tuple[int, int] = (0, 0), norm: Affine | None = None,
    silu: bool = False,
) -> Tensor:  # fmt: skip
    """x float [B, C, H, W], any strides -> int8 [B, H + 2 ph, W + 2 pw, channels]: codes less 128, in a border of zero
    points. norm, silu: applied before, in float32. channels >= C."""
    b, c, h, w = x.shape
    height, width = h + 2 * padding[0], w + 2 * padding[1]
    q = torch.empty(b, height, width, channels, dtype=torch.int8, device=x.device)
    pixels = b * height * width
    if pixels == 0:
        return q
    bc = min(128, power_of_2(channels))
    bp = max(16, 4096 // bc)
    with _on(x.device):
        quantize_kernel[(cdiv(pixels, bp), cdiv(channels, bc))](
            x, q, grid.inverse_balance, grid.scale, grid.zero_point, *(norm or (None, None)),
            pixels, c, channels, h, w, height, width, *padding, *x.stride(),
            HAS_BALANCE=grid.inverse_balance is not None, HAS_GAIN=norm is not None, SILU=silu, BP=bp, BC=bc,
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return q


def quantize_matrix(x: Tensor, grid: StaticInput, channels: int) -> Tensor:
    """x float [M, K], any strides -> int8 [M, channels], channels >= K."""
    # An image of one row: as one of one column it would have two strides of 1, and the compiler would not know which
    # to read along.
    return quantize_image(x.t()[None, :, None, :], grid, channels).view(x.shape[0], channels)


def quantize_rows(x: Tensor, inverse_balance: Tensor | None, bits: int, channels: int) -> Rows:
    """x float [M, K], any strides -> codes in -2^(bits - 1) .. 2^(bits - 1) - 1, a grid for every row."""
    m, k = x.shape
    q = torch.empty(m, channels, dtype=torch.int8, device=x.device)
    scale, offset = (torch.empty(m, dtype=torch.float32, device=x.device) for _ in range(2))
    if m:
        block = min(LONGEST_ROW, power_of_2(channels))
        with _on(x.device):
            quantize_rows_kernel[(m,)](
                x, q, scale, offset, inverse_balance, k, channels, *x.stride(),
                HAS_BALANCE=inverse_balance is not None, HALF=2 ** (bits - 1), BLOCK=block,
                num_warps=4 if block <= 2048 else 8, enable_fp_fusion=False,
            )  # fmt: skip
    return Rows(q, scale, offset)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Affine:
    """GroupNorm of x float [B, C, H, W], any strides, as a product and a sum per image and channel.

    weight, bias: float [C].
    """
    b, c, h, w = x.shape
    gain, shift = (torch.empty(b, c, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return Affine(gain, shift)
    # 64 chunks, more in large images; a block stays in the registers of a program.
    bp = min(1024, max(32, power_of_2(cdiv(h * w, 64))))
    bc = min(64, power_of_2(c), 16384 // bp)
    chunks = cdiv(h * w, bp)
    mean, spread = (torch.empty(b, chunks, c, dtype=torch.float32, device=x.device) for _ in range(2))
    with _on(x.device):
        channel_statistics_kernel[(b * chunks, cdiv(c, bc))](
            x, mean, spread, h * w, c, w, chunks, *x.stride(), BP=bp, BC=bc, num_warps=8,
        )  # fmt: skip
        group_gain_kernel[(b * groups,)](
            mean, spread, weight, bias, gain, shift, h * w, c, chunks, groups, eps,
            BP=bp, BCHUNKS=power_of_2(chunks), BG=power_of_2(c // groups), num_warps=8,
        )  # fmt: skip
    return Affine(gain, shift)


def product(
    q: Tensor, weight: Prepared, grid: StaticInput | None, rows: Rows | None, bias: Tensor | None,
    dtype: torch.dtype, size: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Quantized activations times a weight -> float [M, N] in `dtype`.

    q: int8 [M, C'], or with `size` (images, rows and columns of the output) an image of `quantize_image`. Either grid
    (static) or rows (one grid per row) says what the codes mean.
    """
    g = weight.geometry
    n, c = weight.scale.shape[0], weight.channels
    kh, kw = (g.shape[2], g.shape[3]) if g.is_conv else (1, 1)
    m = q.shape[0] if size is None else size[0] * size[1] * size[2]
    out = torch.empty(m, n, dtype=dtype, device=q.device)
    if m == 0:
        return out
    dense = size is None or (kh * kw == 1 and g.stride == (1, 1) and q.shape[1:3] == size[1:])
    height, width = (1, 1) if size is None else size[1:]
    q_height, q_width = (1, 1) if size is None else q.shape[1:3]
    scale, zero = (None, None) if grid is None else (grid.scale, grid.zero_point)
    row_scale, row_offset = (None, None) if rows is None else (rows.scale, rows.offset)
    epilogue = (scale, zero, row_scale, row_offset, weight.scale, weight.sums, bias, out)
    flags = {"DYNAMIC": rows is not None, "HAS_BIAS": bias is not None}

    def run(tile: Tile) -> None:
        shares = None
        if tile.split > 1:
            shares = torch.empty(tile.split, m, n, dtype=torch.int32, device=q.device)
        product_kernel[(cdiv(m, tile.m) * cdiv(n, tile.n), tile.split)](
            q, weight.codes, weight.factor, weight.zero, *epilogue, shares,
            m, n, c, height, width, q_height, q_width, *g.stride, *g.dilation,
            KH=kh, KW=kw, DENSE=dense, GROUP=weight.group, EVEN_K=c % tile.k == 0, SPLIT=tile.split,
            BM=tile.m, BN=tile.n, BK=tile.k, SWIZZLE=SWIZZLE, num_warps=tile.warps, num_stages=tile.stages, **flags,
        )  # fmt: skip
        if shares is not None:
            finish_kernel[(cdiv(m, 32), cdiv(n, 64))](
                shares, *epilogue, m, n, SPLIT=tile.split, BM=32, BN=64, num_warps=4, **flags
            )

    bits = f"int4/{weight.group}" if weight.group else "int8"
    kind = f"{kh} x {kw} {'dense' if dense else g.stride} {bits} {'rows' if rows else 'static'} {dtype}"
    with _on(q.device):
        run(tuner.choose(Shape(kind, m, n, c, kh * kw), machine(q.device), _timer(run, q.device)))
    return out


def finish(
    sums: Tensor, weight: Prepared, grid: StaticInput | None, rows: Rows | None, bias: Tensor | None, out: Tensor
) -> None:
    """Integer products int32 [M, N] of another's making -> out float [M, N]; both contiguous. The rest as in
    `product`."""
    m, n = out.shape
    scale, zero = (None, None) if grid is None else (grid.scale, grid.zero_point)
    row_scale, row_offset = (None, None) if rows is None else (rows.scale, rows.offset)
    with _on(out.device):
        finish_kernel[(cdiv(m, 32), cdiv(n, 64))](
            sums, scale, zero, row_scale, row_offset, weight.scale, weight.sums, bias, out, m, n,
            DYNAMIC=rows is not None, HAS_BIAS=bias is not None, SPLIT=1, BM=32, BN=64, num_warps=4,
        )  # fmt: skip


def _timer(run: Callable[[Tile], None], device: torch.device) -> Callable[[Tile], float] | None:
    if device.type != "cuda":
        return None

    def time(tile: Tile) -> float:
        _say_once()
        return stopwatch(device).seconds(partial(run, tile))

    return time


_said = False


def _say_once() -> None:
    global _said
    if not _said:
        _said = True
        logging.info("TFMQ: timing int8 kernels for this GPU, once per shape (kept in %s)", tuner.path)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)
