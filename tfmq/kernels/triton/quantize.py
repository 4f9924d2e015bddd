"""Quantization in one pass in Triton: of images with their border and of rows on a static grid, of rows on their own.

The order of the operations is that of `affine.quantize_affine` and `quantize_rows`, with divisions rounded as torch
rounds them, so that the codes are the same ones. Launch these with `enable_fp_fusion=False`: a product that is fused
with the sum behind it is not rounded on its own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    """Nearest integer, ties to even, of |x| < 2^22: adding 1.5 * 2^23 leaves no bit for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def static_codes(x, factor, zero_point):
    """float32 values -> int8: clamp(round(x * factor) + zero_point, 0, 255) - 128."""
    t = tl.minimum(tl.maximum(x * factor, -65536.0), 65536.0)
    code = nearest(t).to(tl.int32) + zero_point
    return (tl.minimum(tl.maximum(code, 0), 255) - 128).to(tl.int8)


@triton.jit(do_not_specialize=["pixels", "height", "width", "q_height", "q_width", "pad_h", "pad_w"])
def quantize_kernel(
    x, q, inverse, act_scale, act_zero, gain, shift,
    pixels, c, q_c, height, width, q_height, q_width, pad_h, pad_w, stride_b, stride_c, stride_h, stride_w,
    HAS_BALANCE: tl.constexpr, HAS_GAIN: tl.constexpr, SILU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """x float [B, c, height, width], any strides -> q int8 [B, q_height, q_width, q_c].

    pixels: B * q_height * q_width.

    The border of pad_h rows and pad_w columns, and the channels from c on, hold the zero point (less 128). HAS_GAIN:
    x * gain + shift is quantized, both float32 [B, c]; SILU: x * sigmoid(x) of that.
    """
    pixel = tl.program_id(0) * BP + tl.arange(0, BP)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    image = pixel // (q_height * q_width)
    place = pixel % (q_height * q_width)
    row, column = place // q_width - pad_h, place % q_width - pad_w
    real = (pixel < pixels) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    live = real[:, None] & (channel < c)[None, :]
    start = image.to(tl.int64) * stride_b + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    at = start[:, None] + channel.to(tl.int64)[None, :] * stride_c
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    if HAS_GAIN:
        per = image.to(tl.int64)[:, None] * c + channel[None, :]
        value = value * tl.load(gain + per, mask=live, other=0.0) + tl.load(shift + per, mask=live, other=0.0)
    if SILU:
        value = value * tl.sigmoid(value)
    scale = tl.load(act_scale)
    zero_point = tl.load(act_zero)
    if HAS_BALANCE:
        balance = tl.load(inverse + channel, mask=channel < c, other=0.0)
        factor = tl.div_rn(balance, tl.broadcast_to(scale, [BC]))[None, :]
    else:
        factor = tl.div_rn(1.0, scale)
    code = tl.where(live, static_codes(value, factor, zero_point), (zero_point - 128).to(tl.int8))
    to = pixel.to(tl.int64)[:, None] * q_c + channel[None, :]
    tl.store(q + to, code, mask=(pixel < pixels)[:, None] & (channel < q_c)[None, :])


@triton.jit
def quantize_rows_kernel(
    x, q, row_scale, row_offset, inverse, k, q_k, stride_m, stride_k,
    HAS_BALANCE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x float [M, k], any strides -> q int8 [M, q_k], zeros from k on, row_scale and row_offset float32 [M].

    One program per row; a row longer than BLOCK is read twice. HALF: 2^(bits - 1).
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, k, BLOCK):
        here = start + column
        value = tl.load(x + row * stride_m + here.to(tl.int64) * stride_k, mask=here < k, other=0.0).to(tl.float32)
        if HAS_BALANCE:
            value = value * tl.load(inverse + here, mask=here < k, other=0.0)
        low = tl.minimum(low, tl.where(here < k, value, float("inf")))
        high = tl.maximum(high, tl.where(here < k, value, float("-inf")))
    least = tl.min(low, 0)
    scale = tl.maximum(tl.div_rn(tl.max(high, 0) - least, 2.0 * HALF - 1.0), 3.0092655e-36)  # float32's tiny * 256
    tl.store(row_scale + row, scale)
    tl.store(row_offset + row, least + HALF * scale)
    for start in range(0, q_k, BLOCK):
        here = start + column
        value = tl.load(x + row * stride_m + here.to(tl.int64) * stride_k, mask=here < k, other=0.0).to(tl.float32)
        if HAS_BALANCE:
            value = value * tl.load(inverse + here, mask=here < k, other=0.0)
        t = tl.div_rn(value - least, tl.broadcast_to(scale, [BLOCK]))
        code = nearest(tl.minimum(tl.maximum(t, 0.0), 65536.0)).to(tl.int32) - HALF
        code = tl.where(here < k, tl.minimum(code, HALF - 1), 0).to(tl.int8)
        tl.store(q + row * q_k + here, code, mask=here < q_k)
