"""The integer product in Triton: a matrix product or a convolution as one (implicit GEMM), weights in 8 or 4 bits.

One kernel for all: an activation row is an output pixel, a weight row an output channel, and the columns run over
[kh, kw, C]. The quantized image carries its own border of zero points, so that no load of a tap needs a mask and the
zero point's share of every sum is the same.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _float_result(
    acc, row, column, m, n, act_scale, act_zero, row_scale, row_offset, scale, sums, bias,
    DYNAMIC: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """int32 products [m, n] -> float32: what the codes stand for, and the bias added.

    row, column: of the block. Here and where results are stored, addresses are made of `row` and `column` under a mask:
    of clamped columns the compiler does not know that they follow each other, and reads and writes them one by one.
    """
    real = column < n
    weight_sums = tl.load(sums + column, mask=real, other=0)
    weight_scale = tl.load(scale + column, mask=real, other=0.0)
    if DYNAMIC:
        per_row = tl.load(row_scale + row, mask=row < m, other=0.0)[:, None]
        offset = tl.load(row_offset + row, mask=row < m, other=0.0)[:, None]
        y = acc.to(tl.float32) * per_row + offset * weight_sums.to(tl.float32)[None, :]
        y = y * weight_scale[None, :]
    else:
        shifted = tl.load(act_zero) - 128
        y = (acc - shifted * weight_sums[None, :]).to(tl.float32) * (tl.load(act_scale) * weight_scale)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _four_bit_tile(codes, factor, zero, columns, k_bytes, groups, start, limit, GROUP: tl.constexpr, BN: tl.constexpr,
                   BK: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """Packed weight -> int8 [BN, BK]: factor * (code - zero), two codes per byte, low half first.

    start: first column of the tile; limit: columns of the tile that exist.
    """
    half = tl.arange(0, BK // 2)
    at = codes + columns.to(tl.int64)[:, None] * k_bytes + (start // 2 + half)[None, :]
    if EVEN_K:
        packed = tl.load(at)
    else:
        packed = tl.load(at, mask=(2 * half < limit)[None, :], other=0)
    code = tl.join(packed & 15, packed >> 4).reshape(BN, BK).to(tl.int8)
    if GROUP >= BK:  # one group spans the tile
        where = columns * groups + start // GROUP
        m = tl.load(factor + where).to(tl.int8)[:, None]
        z = tl.load(zero + where).to(tl.int8)[:, None]
    else:
        part = tl.arange(0, BK // GROUP)
        where = columns[:, None] * groups + (start // GROUP + part)[None, :]
        real = (part * GROUP < limit)[None, :]
        m = tl.load(factor + where, mask=real, other=0).to(tl.int8)[:, :, None]
        z = tl.load(zero + where, mask=real, other=0).to(tl.int8)[:, :, None]
        m = tl.broadcast_to(m, BN, BK // GROUP, GROUP).reshape(BN, BK)
        z = tl.broadcast_to(z, BN, BK // GROUP, GROUP).reshape(BN, BK)
    return (code - z) * m


@triton.jit(
    do_not_specialize=[
        "m", "height", "width", "q_height", "q_width", "stride_h", "stride_w", "dilation_h", "dilation_w",
    ]
)  # fmt: skip
def product_kernel(
    q, codes, factor, zero, act_scale, act_zero, row_scale, row_offset, scale, sums, bias, out, partial,
    m, n, c, height, width, q_height, q_width, stride_h, stride_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, DENSE: tl.constexpr, GROUP: tl.constexpr, DYNAMIC: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWIZZLE: tl.constexpr,
):  # fmt: skip
    """q int8 [B, q_height, q_width, c], codes int8 [n, KH * KW * c] -> out float [m, n], m = B * height * width.

    DENSE: q is a matrix [m, c]. GROUP: 0, or codes are packed 4-bit ones, uint8 [n, KH * KW * c / 2], with factor and
    zero uint8 [n, KH * KW * c / GROUP]. SPLIT > 1: nothing goes to `out`; every share of the columns leaves its int32
    sums in partial [SPLIT, m, n], which `finish_kernel` adds up.
    """
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    tile = tl.program_id(0)
    share = tl.program_id(1)
    # Tiles in bands of SWIZZLE rows: what runs at one time reads few rows of either operand, out of the L2 cache.
    band = tile // (SWIZZLE * tiles_n)
    first = band * SWIZZLE
    band_rows = tl.minimum(tiles_m - first, SWIZZLE)
    inside = tile % (SWIZZLE * tiles_n)
    row = (first + inside % band_rows) * BM + tl.arange(0, BM)
    column = (inside // band_rows) * BN + tl.arange(0, BN)
    # Rows and columns over the edge read what the last one reads, without a mask, and are not stored.
    rows, columns = tl.minimum(row, m - 1), tl.minimum(column, n - 1)
    if DENSE:
        base = rows.to(tl.int64) * c
    else:
        pixel = rows % (height * width)
        image = rows // (height * width)
        y, x = (pixel // width) * stride_h, (pixel % width) * stride_w
        base = ((image.to(tl.int64) * q_height + y) * q_width + x) * c
    blocks = tl.cdiv(c, BK)
    total = KH * KW * blocks
    each = tl.cdiv(total, SPLIT)
    k = tl.arange(0, BK)
    k_bytes = KH * KW * c // 2
    a_rows = q + base[:, None] + k[None, :]
    b_columns = codes + columns.to(tl.int64)[None, :] * (KH * KW * c) + k[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for step in range(share * each, tl.minimum(total, (share + 1) * each)):
        tap = step // blocks
        start = (step % blocks) * BK
        limit = c - start
        if DENSE:
            offset = start
        else:
            offset = ((tap // KW) * dilation_h * q_width + (tap % KW) * dilation_w) * c + start
        if EVEN_K:
            a = tl.load(a_rows + offset)
        else:
            a = tl.load(a_rows + offset, mask=k[None, :] < limit, other=0)
        if GROUP > 0:
            groups = KH * KW * c // GROUP
            tile_w = _four_bit_tile(
                codes, factor, zero, columns, k_bytes, groups, tap * c + start, limit, GROUP, BN, BK, EVEN_K
            )
            b = tl.trans(tile_w)
        elif EVEN_K:
            b = tl.load(b_columns + tap * c + start)
        else:
            b = tl.load(b_columns + tap * c + start, mask=k[:, None] < limit, other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    live = (row < m)[:, None] & (column < n)[None, :]
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    if SPLIT > 1:
        tl.store(partial + share.to(tl.int64) * m * n + at, acc, mask=live)
    else:
        result = _float_result(
            acc, row, column, m, n, act_scale, act_zero, row_scale, row_offset, scale, sums, bias, DYNAMIC, HAS_BIAS,
        )  # fmt: skip
        tl.store(out + at, result.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["m"])
def finish_kernel(
    partial, act_scale, act_zero, row_scale, row_offset, scale, sums, bias, out, m, n,
    DYNAMIC: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """partial int32 [SPLIT, m, n] -> out float [m, n]: the shares added, in integers and so exactly, then as above."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    live = (row < m)[:, None] & (column < n)[None, :]
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    acc = tl.load(partial + at, mask=live, other=0)
    size = m.to(tl.int64) * n
    for share in range(1, SPLIT):
        acc += tl.load(partial + share * size + at, mask=live, other=0)
    result = _float_result(
        acc, row, column, m, n, act_scale, act_zero, row_scale, row_offset, scale, sums, bias, DYNAMIC, HAS_BIAS,
    )  # fmt: skip
    tl.store(out + at, result.to(out.dtype.element_ty), mask=live)
