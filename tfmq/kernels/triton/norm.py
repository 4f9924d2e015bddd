"""GroupNorm as a product and a sum per image and channel, which `quantize_kernel` applies before it rounds.

A static grid is known before its layer runs, so that the normalized values need not go to memory in float. They are
computed in float32 without a rounding in between; the codes are those of a float32 norm.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pixels", "width", "chunks"])
def channel_statistics_kernel(
    x, mean, spread, pixels, c, width, chunks, stride_b, stride_c, stride_h, stride_w, BP: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """x float [B, c, H, W], any strides -> mean of every chunk of BP pixels and sum of squares about it, both float32
    [B, chunks, c]; pixels = H * W."""
    image, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    pixel = chunk * BP + tl.arange(0, BP)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    live = (pixel < pixels)[:, None] & (channel < c)[None, :]
    start = image.to(tl.int64) * stride_b
    at = (pixel // width).to(tl.int64) * stride_h + (pixel % width).to(tl.int64) * stride_w
    value = tl.load(x + start + at[:, None] + channel.to(tl.int64)[None, :] * stride_c, mask=live, other=0.0)
    value = value.to(tl.float32)
    count = tl.minimum(pixels - chunk * BP, BP).to(tl.float32)
    average = tl.sum(value, 0) / count
    off = tl.where(live, value - average[None, :], 0.0)
    to = (image.to(tl.int64) * chunks + chunk) * c + channel
    tl.store(mean + to, average, mask=channel < c)
    tl.store(spread + to, tl.sum(off * off, 0), mask=channel < c)


@triton.jit(do_not_specialize=["pixels", "chunks"])
def group_gain_kernel(
    mean, spread, weight, bias, gain, shift, pixels, c, chunks, groups, eps,
    BP: tl.constexpr, BCHUNKS: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """The statistics of the chunks -> what GroupNorm multiplies and adds, float32 [B, c]. One program per image and
    group; BCHUNKS >= chunks, BG >= c / groups. The merge is that of Chan, Golub and LeVeque, 1979, eq. 2.1."""
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    each = c // groups
    chunk = tl.arange(0, BCHUNKS)
    member = tl.arange(0, BG)
    channel = group * each + member
    live = (chunk < chunks)[:, None] & (member < each)[None, :]
    at = (image.to(tl.int64) * chunks + chunk)[:, None] * c + channel[None, :]
    part = tl.load(mean + at, mask=live, other=0.0)
    inside = tl.load(spread + at, mask=live, other=0.0)
    count = tl.where(live, tl.minimum(pixels - chunk * BP, BP)[:, None].to(tl.float32), 0.0)
    total = pixels.to(tl.float32) * each
    average = tl.sum(tl.sum(part * count, 1), 0) / total
    off = part - average
    variance = tl.sum(tl.sum(inside + off * off * count, 1), 0) / total
    inverse = 1.0 / tl.sqrt(variance + eps)
    mine = member < each
    slope = tl.load(weight + channel, mask=mine, other=0.0).to(tl.float32) * inverse
    to = image.to(tl.int64) * c + channel
    tl.store(gain + to, slope, mask=mine)
    tl.store(shift + to, tl.load(bias + channel, mask=mine, other=0.0).to(tl.float32) - average * slope, mask=mine)
