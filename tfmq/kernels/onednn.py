"""CPU int8 through the oneDNN operations that torch ships (u8 activations, s8 weights, int32 accumulation)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quantizer import per_channel, quantize_affine
from .geometry import Geometry, StaticInput


class Prepared(NamedTuple):
    """The weight in oneDNN's own order, with scales, zeros for its zero points, and sums per output channel."""

    packed: Tensor
    scale: Tensor
    zeros: Tensor
    sums: Tensor
    geometry: Geometry


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
    if geometry.is_conv:
        packed = torch.ops.onednn.qconv_prepack(
            codes, scale, 1.0, 1, list(geometry.stride), list(geometry.padding), list(geometry.dilation),
            geometry.groups, None,
        )  # fmt: skip
    else:
        packed = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
    zeros = torch.zeros(codes.shape[0], dtype=torch.int32)
    return Prepared(packed, scale.contiguous(), zeros, codes.flatten(1).sum(1, dtype=torch.int32), geometry)


def linear_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """As `reference.linear_static`."""
    q = quantize_affine(x, grid.scale, grid.zero_point, grid.inverse_balance)
    y = _linear(q.reshape(-1, q.shape[-1]), grid.scale, grid.zero_point, weight, bias, _output(x.dtype))
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def linear_dynamic(
    x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bias: Tensor | None, bits: int = 8
) -> Tensor:
    """As `reference.linear_dynamic`."""
    rows = x.reshape(-1, x.shape[-1]).float()
    if inverse_balance is not None:
        rows = rows * inverse_balance
    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min_(torch.finfo(torch.float32).tiny * 256)
    q = rows.sub(low).div_(scale).round_().to(torch.uint8)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    # float32 out: the offset's share cancels in the next line, which bfloat16 has not the digits for.
    y = _linear(q, one, zero, weight, None, torch.float32).mul_(scale)
    y.addr_(low.flatten(), weight.sums.float() * weight.scale)
    if bias is not None:
        y += bias
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def conv2d_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """As `reference.conv2d_static`; the result is in channels_last order."""
    g = weight.geometry
    width = g.output_size(x.shape[2], x.shape[3])[1]
    if width == 1 and g.stride[1] > 1:
        x = F.pad(x, (0, g.stride[1]))  # a single column comes out wrong (see `unsafe`): make two and drop one
    x = x.contiguous(memory_format=torch.channels_last)
    inverse = None if grid.inverse_balance is None else per_channel(grid.inverse_balance, 4, 1)
    q = quantize_affine(x, grid.scale, grid.zero_point, inverse)
    y = torch.ops.onednn.qconv2d_pointwise.tensor(
        q, grid.scale, grid.zero_point, weight.packed, weight.scale, weight.zeros,
        None if bias is None else bias.float(), list(g.stride), list(g.padding), list(g.dilation), g.groups,
        1.0, 0, _output(x.dtype), "none", [], "",
    )  # fmt: skip
    return y[..., :width].to(x.dtype)


def _linear(
    q: Tensor, scale: Tensor, zero_point: Tensor, weight: Prepared, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise.tensor(
        q, scale, zero_point, weight.packed, weight.scale, weight.zeros, None if bias is None else bias.float(),
        1.0, 0, dtype, "none", [], "",
    )  # fmt: skip


def _output(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
