"""CPU int8 through the oneDNN operations that torch ships (u8 activations, s8 weights, int32 accumulation).

What surrounds the product is memory traffic, so it runs in blocks that stay in the cache, over one scratch buffer: a
fresh allocation of some megabytes costs more in page faults than the arithmetic on it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .geometry import Geometry, StaticInput

BLOCK = 1 << 18  # entries per thread that are quantized at a time: 1 MB in float32
MIN_ROWS = 128  # of a block that is multiplied at once: fewer would read the weight too often
PATIENCE = 3  # calls in a row with images of another shape before a weight is put in order for those
# Added to a float32 under 2^22 it rounds it, half to even, and leaves the integer in the low bits.
MAGIC = 1.5 * 2.0**23


@dataclass(eq=False)
class Prepared:
    """The weight in oneDNN's own order, with scales, zeros for its zero points, and scaled sums per output channel.

    image: what a convolution's order is made for, [B, C, H, W] of its padded codes; None: they lie as they came.
    strangers: calls in a row that had another image.
    """

    packed: Tensor
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
                self.buffer = torch.empty(rows * columns)
        return self.buffer[: rows * columns].view(rows, columns)


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
        # Without VNNI oneDNN adds pairs of products in int16, which saturates.
        return "the processor has no VNNI instructions"
    return None


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


def prepare(codes: Tensor, scale: Tensor, geometry: Geometry) -> Prepared:
    # A convolution's order depends on the image, so the first one that comes decides.
    packed = codes if geometry.is_conv else torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
    zeros = torch.zeros(codes.shape[0], dtype=torch.int32)
    sums = codes.flatten(1).sum(1, dtype=torch.int32).float() * scale
    return Prepared(packed, scale.contiguous(), zeros, sums, geometry)


def restore(weight: Prepared) -> Tensor:
    """The codes that `prepare` was given, int8 of the weight's shape, contiguous."""
    if not weight.geometry.is_conv:
        return weight.packed.to_dense().t().contiguous()
    return weight.packed.clone() if weight.image is None else weight.packed.to_dense()


def _order_for(weight: Prepared, image: torch.Size) -> None:
    """Put a convolution's weight in the order for such images: out of any other, oneDNN copies it at every call."""
    if image == weight.image:
        weight.strangers = 0
        return
    weight.strangers += 1
    if weight.image is not None and weight.strangers < PATIENCE:
        return
    g = weight.geometry
    codes = weight.packed if weight.image is None else weight.packed.to_dense()
    weight.packed = torch.ops.onednn.qconv_prepack(
        codes, weight.scale, 1.0, 0, list(g.stride), [0, 0], list(g.dilation), g.groups, list(image)
    )
    weight.image, weight.strangers = image, 0


class _Affine(NamedTuple):
    """A static grid as the blocks want it, float32: factor [K] or [1], zero point [1]."""

    factor: Tensor
    zero_point: Tensor


def _affine(grid: StaticInput) -> _Affine:
    factor = grid.scale.reciprocal() if grid.inverse_balance is None else grid.inverse_balance / grid.scale
    return _Affine(factor, grid.zero_point.float())


def _quantize(rows: Tensor, affine: _Affine, out: Tensor) -> None:
    """rows float [M, K] -> codes uint8 into `out`, a view of as many entries; as `quantizer.quantize_affine`."""
    block = _scratch.take(*rows.shape)
    # Bounds that are tensors would make the clamp several times as slow: torch has no vector code for those.
    block.copy_(rows.detach()).mul_(affine.factor).add_(MAGIC).add_(affine.zero_point).clamp_(MAGIC, MAGIC + 255)
    out.copy_(block.view(torch.int32).view(out.shape))  # the low byte


def _step(width: int) -> int:
    """How many rows of so many entries make a block."""
    return max(1, BLOCK * torch.get_num_threads() // width)


def linear_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """As `reference.linear_static`."""
    rows = x.reshape(-1, x.shape[-1])
    q = torch.empty(rows.shape, dtype=torch.uint8)
    affine, step = _affine(grid), _step(rows.shape[1])
    for part, codes in zip(rows.split(step), q.split(step), strict=True):
        _quantize(part, affine, codes)
    y = _linear(q, grid.scale, grid.zero_point, weight, bias, _output(x.dtype))
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def linear_dynamic(
    x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bias: Tensor | None, bits: int = 8
) -> Tensor:
    """As `reference.linear_dynamic`."""
    rows = x.reshape(-1, x.shape[-1])
    n = weight.scale.shape[0]
    out = torch.empty(rows.shape[0], n, dtype=x.dtype)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    # The offset of a row meets the sum of each output channel, a column of ones the bias.
    offsets = torch.ones(rows.shape[0], 2)
    terms = torch.stack([weight.sums, torch.zeros(n) if bias is None else bias.float()])
    step = max(MIN_ROWS, _step(max(rows.shape[1], n)))
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        block = _scratch.take(*part.shape)
        block.copy_(part.detach())
        if inverse_balance is not None:
            block.mul_(inverse_balance)
        low, high = block.amin(1, keepdim=True), block.amax(1, keepdim=True)
        scale = high.sub_(low).div_(2**bits - 1).clamp_min_(torch.finfo(torch.float32).tiny * 256)
        block.sub_(low).div_(scale).add_(MAGIC)
        q = block.view(torch.int32).to(torch.uint8)
        # float32 out: the offset's share cancels in what follows, which bfloat16 has not the digits for.
        y = _linear(q, one, zero, weight, None, torch.float32).mul_(scale)
        here = offsets[start : start + step]
        here[:, :1] = low
        out[start : start + step] = y.addmm_(here, terms)
    return out.reshape(*x.shape[:-1], -1)


def conv2d_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """As `reference.conv2d_static`; the result is in channels_last order.

    The image is padded with the zero point while it is quantized, and what the zero point adds to every sum is taken
    off with the bias: oneDNN's own zero points of a padded convolution cost it up to half as much again.
    """
    g = weight.geometry
    width = g.output_size(x.shape[2], x.shape[3])[1]
    if width == 1 and g.stride[1] > 1:
        x = F.pad(x, (0, g.stride[1]))  # a single column comes out wrong (see `unsafe`): make two and drop one
    q = _padded_codes(x, grid, g.padding)
    _order_for(weight, q.shape)
    offset = weight.sums * (grid.scale * grid.zero_point)
    y = torch.ops.onednn.qconv2d_pointwise.tensor(
        q, grid.scale, torch.zeros_like(grid.zero_point), weight.packed, weight.scale, weight.zeros,
        -offset if bias is None else bias.float() - offset, list(g.stride), [0, 0], list(g.dilation), g.groups,
        1.0, 0, _output(x.dtype), "none", [], "",
    )  # fmt: skip
    return y[..., :width].to(x.dtype)


def _padded_codes(x: Tensor, grid: StaticInput, padding: tuple[int, int]) -> Tensor:
    """x [B, C, H, W] -> uint8 [B, C, H + 2 p, W + 2 p] in channels_last order, the border holding the zero point."""
    b, c, h, w = x.shape
    top, left = padding
    affine = _affine(grid)
    q = torch.empty(b, h + 2 * top, w + 2 * left, c, dtype=torch.uint8)
    inside, border = q[:, top : top + h], grid.zero_point.to(torch.uint8)
    for edge in (q[:, :top], q[:, top + h :], inside[:, :, :left], inside[:, :, left + w :]):
        edge.copy_(border.expand(edge.shape))
    inside, pixels = inside[:, :, left : left + w], x.permute(0, 2, 3, 1)
    step = _step(w * c)
    for image, codes in zip(pixels, inside, strict=True):
        for part, place in zip(image.split(step), codes.split(step), strict=True):
            _quantize(part.reshape(-1, c), affine, place)
    return q.permute(0, 3, 1, 2)


def _linear(
    q: Tensor, scale: Tensor, zero_point: Tensor, weight: Prepared, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise.tensor(
        q, scale, zero_point, weight.packed, weight.scale, weight.zeros, None if bias is None else bias.float(),
        1.0, 0, dtype, "none", [], "",
    )  # fmt: skip


def _output(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
