"""CPU int8 through the oneDNN operations that torch ships (u8 activations, s8 weights, int32 accumulation).

What surrounds the product is memory traffic, so it runs in blocks of a few megabytes, over one scratch buffer: a fresh
allocation of such a size costs more in page faults than the arithmetic on it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry import Codes, Geometry, Norm, StaticInput, code_sums, geglu
from .trial import once

BLOCK = 1 << 18  # entries per thread that are quantized at a time: 1 MB in float32
MIN_ROWS = 1024  # of a block that is multiplied at once: with fewer, starting the threads takes the time
# Pixels of an image in channels_last order from which on torch's own GroupNorm is as fast as anything here.
LARGE_IMAGE = 1024
PATIENCE = 3  # calls in a row with images of another shape before a weight is put in order for those
# Values of ONEDNN_MAX_CPU_ISA below the bfloat16 products.
WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
# Added to a float32 under 2^22 it rounds it, half to even, and leaves the integer in the low bits.
MAGIC = 1.5 * 2.0**23


@dataclass(eq=False)
class Prepared:
    """The weight in oneDNN's own order, with scales, zeros for its zero points, and scaled sums per output channel.

    packed: one part, or the two halves of the output channels that `multiply_gated` wants.
    image: what a convolution's order is made for, [B, C, H, W] of its padded codes; None: they lie as they came.
    strangers: calls in a row that had another image.
    """

    packed: tuple[Tensor, ...]
    scale: Tensor
    zeros: Tensor
    sums: Tensor
    geometry: Geometry
    image: torch.Size | None = None
    strangers: int = 0


class _Scratch(threading.local):
    """One float32 buffer per thread of the program."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0)

    def take(self, rows: int, columns: int) -> Tensor:
        if self.buffer.numel() < rows * columns:
            with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
                self.buffer = torch.empty(rows * columns, dtype=torch.float32)
        return self.buffer[: rows * columns].view(rows, columns)


@lru_cache(maxsize=256)
def _constant(value: float, width: int) -> Tensor:
    """float32 [width], all the same."""
    with torch.inference_mode(False):  # kept for every later caller, inside of inference mode or not
        return torch.full((width,), value, dtype=torch.float32)


_scratch = _Scratch()


def missing() -> str | None:
    """Why this machine cannot run these operations, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if not all(
        hasattr(torch.ops.onednn, name)
        for name in ("qlinear_prepack", "qlinear_pointwise", "qconv_prepack", "qconv2d_pointwise")
    ):
        return "this torch has no quantized oneDNN operations"
    vnni = getattr(torch.cpu, "_is_vnni_supported", None) or getattr(torch.cpu, "_is_avx512_vnni_supported", None)
    if vnni is None or not vnni():
        return "the processor has no VNNI instructions"
    if not _adds_exactly():
        return "oneDNN makes no use of VNNI instructions here (is ONEDNN_MAX_CPU_ISA set?)"
    return None


def _adds_exactly() -> bool:
    """Whether the sums are those of integers, where no pair of products fits in 16 bits.

    Without VNNI, or kept from it by ONEDNN_MAX_CPU_ISA, oneDNN adds pairs in int16, which saturates. It reads the
    variable once per process; no function that torch exports says what it made of it. Where nothing can be tried, the
    processor is believed.
    """
    return once("onednn", _try, torch.device("cpu")) is not False


def _try() -> bool:
    k = 64
    with torch.inference_mode():
        packed = torch.ops.onednn.qlinear_prepack(torch.full((16, k), 127, dtype=torch.int8), None)
        zeros, q = torch.zeros(16, dtype=torch.int32), torch.full((4, k), 255, dtype=torch.uint8)
        y = _product(q, torch.ones(1), packed, torch.ones(16), zeros, None, torch.float32)
    return bool((y == 255 * 127 * k).all())


def fast_bfloat16() -> bool:
    """Whether oneDNN may use the processor's own bfloat16 products, where it has them."""
    bound = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    if bound.upper() in WITHOUT_BFLOAT16:
        return False
    known = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(is_there() for is_there in known if is_there is not None)


def unsafe(geometry: Geometry) -> str | None:
    """Why this layer is not left to oneDNN, or None.

    On a processor with AMX the oneDNN of torch 2.13 gave wrong sums, without an error, for some convolutions of each
    of these kinds (tests/unit/test_kernels.py compares what is left with exact integers).
    """
    if not geometry.is_conv:
        return None
    if geometry.groups != 1:
        return "grouped convolution"
    if geometry.stride not in ((1, 1), (2, 2)):
        return f"stride {geometry.stride[0]} x {geometry.stride[1]}"
    if geometry.dilation != (1, 1):
        return "dilation"
    if any(p >= k for p, k in zip(geometry.padding, geometry.shape[2:], strict=True)):
        return "padding as wide as the kernel"
    return None


def prepare(codes: Tensor, scale: Tensor, geometry: Geometry, sums: Tensor | None = None) -> Prepared:
    """As `reference.prepare`."""
    # A convolution's order depends on the image, so the first one that comes decides.
    packed = codes.contiguous() if geometry.is_conv else torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
    zeros = torch.zeros(codes.shape[0], dtype=torch.int32)
    sums = code_sums(codes) if sums is None else sums
    return Prepared((packed,), scale.contiguous(), zeros, sums.float() * scale, geometry)


def restore(weight: Prepared) -> Tensor:
    """The codes that `prepare` was given, int8 of the weight's shape, contiguous."""
    if not weight.geometry.is_conv:
        return torch.cat([part.to_dense().t() for part in weight.packed])
    return weight.packed[0].clone() if weight.image is None else weight.packed[0].to_dense()


def _in_parts(weight: Prepared, count: int) -> tuple[Tensor, ...]:
    """A Linear's weight in `count` parts of the output channels, in which it stays."""
    packed = weight.packed
    if len(packed) != count:
        parts = restore(weight).chunk(count)
        packed = tuple(torch.ops.onednn.qlinear_prepack(part.contiguous(), None) for part in parts)
        weight.packed = packed
    return packed


def _order_for(weight: Prepared, image: torch.Size) -> None:
    """Put a convolution's weight in the order for such images: out of any other, oneDNN copies it at every call."""
    if image == weight.image:
        weight.strangers = 0
        return
    weight.strangers += 1
    if weight.image is not None and weight.strangers < PATIENCE:
        return
    g = weight.geometry
    codes = weight.packed[0] if weight.image is None else weight.packed[0].to_dense()
    packed = torch.ops.onednn.qconv_prepack(
        codes, weight.scale, 1.0, 0, list(g.stride), [0, 0], list(g.dilation), g.groups, list(image)
    )
    weight.packed = (packed,)
    weight.image, weight.strangers = image, 0


class _Affine(NamedTuple):
    """A static grid as the blocks want it, float32 [K] each: `zero` is MAGIC and the zero point.

    Both of full length, without which torch has no vector code for `addcmul`. One addition in place of two: where the
    zero point is odd, what lies in the very middle between two codes goes to the other one.
    """

    factor: Tensor
    zero: Tensor

    def scale(self, block: Tensor) -> None:
        torch.addcmul(self.zero, block, self.factor, out=block)


class _Activated(NamedTuple):
    """SiLU and then a static grid. gain, shift: of a norm before, float32 [C] each."""

    grid: _Affine
    gain: Tensor | None = None
    shift: Tensor | None = None

    def scale(self, block: Tensor) -> None:
        if self.gain is not None and self.shift is not None:
            torch.addcmul(self.shift, block, self.gain, out=block)
        F.silu(block, inplace=True)
        self.grid.scale(block)


def _affine(grid: StaticInput, width: int) -> _Affine:
    """width: K."""
    inverse = _constant(1.0, width) if grid.inverse_balance is None else grid.inverse_balance
    return _Affine(inverse / grid.scale, _constant(MAGIC, width) + grid.zero_point)


def _quantize(rows: Tensor, affine: _Affine | _Activated, out: Tensor) -> None:
    """rows float [M, K] -> codes uint8 into `out`, a view of as many entries; as `affine.quantize_affine`."""
    block = _scratch.take(*rows.shape)
    block.copy_(rows.detach())
    affine.scale(block)
    # Bounds that are tensors would make the clamp several times as slow: torch has no vector code for those.
    block.clamp_(MAGIC, MAGIC + 255)
    out.copy_(block.view(torch.int32).view(out.shape))  # the low byte


def _step(width: int) -> int:
    """How many rows of `width` entries make a block."""
    return max(1, BLOCK * torch.get_num_threads() // width)


def linear_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """As `reference.linear_static`."""
    return multiply(quantize_static(x, weight, grid), weight, bias)


def linear_dynamic(
    x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bias: Tensor | None, bits: int = 8
) -> Tensor:
    """As `reference.linear_dynamic`."""
    rows = x.reshape(-1, x.shape[-1])
    step = _dynamic_step(weight)
    starts = range(0, rows.shape[0], step)
    # Each block is multiplied while its codes are in the cache.
    blocks = (_codes_of(rows[start : start + step], inverse_balance, bits) for start in starts)
    return _dynamic(blocks, rows.shape[0], weight, bias, x.dtype).reshape(*x.shape[:-1], -1)


def quantize_static(x: Tensor, weight: Prepared, grid: StaticInput) -> Codes:
    """As `reference.quantize_static`."""
    rows = x.reshape(-1, x.shape[-1])
    q = torch.empty(rows.shape, dtype=torch.uint8)
    affine, step = _affine(grid, rows.shape[1]), _step(rows.shape[1])
    for start in range(0, rows.shape[0], step):
        _quantize(rows[start : start + step], affine, q[start : start + step])
    return Codes(q, grid, None, None, x.shape, x.dtype)


def quantize_dynamic(x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bits: int = 8) -> Codes:
    """As `reference.quantize_dynamic`; its scales and offsets are those of unsigned codes."""
    rows = x.reshape(-1, x.shape[-1])
    q, scale, offset = _codes_of(rows, inverse_balance, bits)
    return Codes(q, None, scale, offset, x.shape, x.dtype)


def multiply(codes: Codes, weight: Prepared, bias: Tensor | None) -> Tensor:
    """As `reference.multiply`."""
    q, grid, scale, offset, shape, dtype = codes
    if grid is not None:
        y = _linear(q, grid.scale, weight, _offset(weight, grid, bias), _output(dtype)).to(dtype)
    else:
        assert scale is not None and offset is not None
        step = _dynamic_step(weight)  # the same blocks as when nothing is shared: the same sums
        blocks = zip(q.split(step), scale.split(step), offset.split(step), strict=True)
        y = _dynamic(blocks, q.shape[0], weight, bias, dtype)
    return y.reshape(*shape[:-1], -1)


def multiply_gated(codes: Codes, weight: Prepared, bias: Tensor | None) -> Tensor:
    """As `reference.multiply_gated`; GELU is computed inside the product."""
    q, grid, _, _, shape, dtype = codes
    if grid is None or weight.geometry.shape[0] % 2:
        return geglu(multiply(codes, weight, bias))
    bias = _offset(weight, grid, bias)
    halves = zip(
        _in_parts(weight, 2), weight.scale.chunk(2), weight.zeros.chunk(2), bias.chunk(2), ("none", "gelu"), strict=True
    )
    value, gate = (_product(q, grid.scale, *half[:4], _output(dtype), half[4]) for half in halves)
    return value.mul_(gate).to(dtype).reshape(*shape[:-1], -1)


def _codes_of(rows: Tensor, inverse_balance: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """`_row_codes` of any number of rows, in blocks."""
    count, width = rows.shape
    step = 2 * _step(width)
    if count <= step:
        return _row_codes(rows, inverse_balance, bits)
    q = torch.empty(rows.shape, dtype=torch.uint8)
    scale, offset = torch.empty(2, count, 1, dtype=torch.float32)
    for start in range(0, count, step):
        here = slice(start, start + step)
        q[here], scale[here], offset[here] = _row_codes(rows[here], inverse_balance, bits)
    return q, scale, offset


def _row_codes(rows: Tensor, inverse_balance: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """rows float [M, K] -> codes uint8 [M, K], scale and offset [M, 1]."""
    block = _scratch.take(*rows.shape)
    block.copy_(rows.detach())
    if inverse_balance is not None:
        block.mul_(inverse_balance)
    low, high = block.amin(1, keepdim=True), block.amax(1, keepdim=True)
    scale = high.sub_(low).div_(2**bits - 1).clamp_min_(torch.finfo(torch.float32).tiny * 256)
    block.sub_(low).mul_(scale.reciprocal()).add_(MAGIC)
    return block.view(torch.int32).to(torch.uint8), scale, low


def _dynamic_step(weight: Prepared) -> int:
    """Rows of a block of a per-token product."""
    return max(MIN_ROWS, _step(max(weight.geometry.shape)))


def _dynamic(
    blocks: Iterable[tuple[Tensor, Tensor, Tensor]], count: int, weight: Prepared, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Codes, scales and offsets of `count` rows in blocks -> [count, N]."""
    n = weight.scale.shape[0]
    out = torch.empty(count, n, dtype=dtype)
    one = _constant(1.0, 1)
    # The offset of a row meets the sum of each output channel, a column of ones the bias.
    offsets = torch.ones(count, 2)
    terms = torch.stack([weight.sums, torch.zeros(n) if bias is None else bias.float()])
    start = 0
    for q, scale, low in blocks:
        # float32 out: the offset's share cancels in what follows, which bfloat16 has not the digits for.
        y = _linear(q, one, weight, None, torch.float32).mul_(scale)
        here = offsets[start : start + q.shape[0]]
        here[:, :1] = low
        out[start : start + q.shape[0]] = y.addmm_(here, terms)
        start += q.shape[0]
    return out


def conv2d_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """As `reference.conv2d_static`; the result is in channels_last order.

    The image is padded with the zero point while it is quantized.
    """
    g = weight.geometry
    width = g.output_size(x.shape[2], x.shape[3])[1]
    if width == 1 and g.stride[1] > 1:
        x = F.pad(x, (0, g.stride[1]))  # a single column comes out wrong (see `unsafe`): make two and drop one
    q = _padded_codes(x, grid, g.padding, [_affine(grid, x.shape[1])] * x.shape[0])
    return _convolve(q, weight, grid, bias, x.dtype)[..., :width]


def conv2d_static_normed(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None, norm: Norm) -> Tensor:
    """`conv2d_static` of SiLU(norm(x)), with no rounding to x's dtype behind the SiLU.

    SiLU is done in the blocks that are quantized, and so is the norm in a small image: there torch's own needs twice
    the time.
    """
    g = weight.geometry
    channels, height, width = x.shape[1:]
    if g.output_size(height, width)[1] == 1 and g.stride[1] > 1:
        return conv2d_static(F.silu(norm(x)), weight, grid, bias)
    affine = _affine(grid, channels)
    if height * width < LARGE_IMAGE and x.is_contiguous(memory_format=torch.channels_last):
        each = [_Activated(affine, *of_image) for of_image in zip(*_gain_and_shift(x, norm), strict=True)]
        q = _padded_codes(x, grid, g.padding, each)
    else:
        q = _padded_codes(norm(x), grid, g.padding, [_Activated(affine)] * x.shape[0])
    return _convolve(q, weight, grid, bias, x.dtype)


def _gain_and_shift(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """GroupNorm of x [B, C, H, W] as a product and a sum, float32 [B, C] each.

    Mean and variance of a group from those of its channels, which are merged as in Chan, Golub and LeVeque, 1979.
    """
    channels = x.shape[1]
    # Given running statistics in float32, of which it makes no use here, torch returns its own in float32 too.
    running = torch.zeros(channels), torch.ones(channels)
    each = [torch.batch_norm_update_stats(image.unsqueeze(0).detach(), *running, 0.0) for image in x]
    means, variances = (torch.stack(part).unflatten(1, (norm.groups, -1)) for part in zip(*each, strict=True))
    mean = means.mean(2, keepdim=True)
    variance = (variances + (means - mean).square()).mean(2, keepdim=True)
    gain = norm.weight.detach().float().view(norm.groups, -1) * (variance + norm.eps).rsqrt()
    return gain.flatten(1), (norm.bias.detach().float().view(norm.groups, -1) - mean * gain).flatten(1)


def _convolve(q: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """q: uint8 [B, C, H, W], padded -> [B, N, H', W']."""
    g = weight.geometry
    _order_for(weight, q.shape)
    y = torch.ops.onednn.qconv2d_pointwise.tensor(
        q, grid.scale, _no_zero_point(), weight.packed[0], weight.scale, weight.zeros,
        _offset(weight, grid, bias), list(g.stride), [0, 0], list(g.dilation), g.groups, 1.0, 0, _output(dtype),
        "none", [], "",
    )  # fmt: skip
    return y.to(dtype)


def _offset(weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """The bias, less what the zero point adds to every sum, float32 [N].

    oneDNN's own zero points cost a product up to a third of its time, a padded convolution up to half of it.
    """
    added = grid.scale * grid.zero_point
    if bias is None:
        return weight.sums * -added
    return torch.addcmul(bias.float(), weight.sums, added, value=-1)


def _padded_codes(
    x: Tensor, grid: StaticInput, padding: tuple[int, int], affines: Sequence[_Affine | _Activated]
) -> Tensor:
    """x [B, C, H, W] -> uint8 [B, C, H + 2 p, W + 2 p] in channels_last order, the border holding the zero point.

    affines: of `_quantize`, one per image.
    """
    b, c, h, w = x.shape
    top, left = padding
    q = torch.empty(b, h + 2 * top, w + 2 * left, c, dtype=torch.uint8)
    for edge in (*_both_ends(q, 1, top), *_both_ends(q[:, top : top + h], 2, left)):
        edge.copy_(grid.zero_point)
    inside, pixels = q[:, top : top + h, left : left + w], x.permute(0, 2, 3, 1)
    step = _step(w * c)
    for i, affine in enumerate(affines):
        for start in range(0, h, step):
            _quantize(pixels[i, start : start + step].reshape(-1, c), affine, inside[i, start : start + step])
    return q.permute(0, 3, 1, 2)


def _both_ends(x: Tensor, dim: int, width: int) -> tuple[Tensor, ...]:
    """The first and the last `width` of x along `dim`, in as few views as hold them."""
    if width == 1:
        index = [slice(None)] * dim + [slice(None, None, x.shape[dim] - 1)]
        return (x[tuple(index)],)
    return (x.narrow(dim, 0, width), x.narrow(dim, x.shape[dim] - width, width)) if width else ()


def _linear(q: Tensor, scale: Tensor, weight: Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    (packed,) = _in_parts(weight, 1)
    return _product(q, scale, packed, weight.scale, weight.zeros, bias, dtype)


def _product(
    q: Tensor, scale: Tensor, packed: Tensor, weight_scale: Tensor, zeros: Tensor, bias: Tensor | None,
    dtype: torch.dtype, then: str = "none",
) -> Tensor:  # fmt: skip
    return torch.ops.onednn.qlinear_pointwise.tensor(
        q, scale, _no_zero_point(), packed, weight_scale, zeros, None if bias is None else bias.float(), 1.0, 0, dtype,
        then, [], "none",
    )  # fmt: skip


@lru_cache(maxsize=1)
def _no_zero_point() -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(1, dtype=torch.int32)


def _output(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
