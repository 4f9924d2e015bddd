"""int8 on NVIDIA GPUs in Triton: one pass that quantizes, one that multiplies and finishes. Weights in 8 or 4 bits.

Nothing here imports Triton before it is used: the pack runs without it. Under torch.compile the operations appear as
custom operations (`ops`), which a compiled graph takes as they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ...geometry import Codes, Geometry, Norm, StaticInput, code_sums

if TYPE_CHECKING:
    from ...formats.int4 import Packed
    from .launch import Prepared

CAPABILITY = (8, 0)  # Triton 3.7 compiles no int8 product for 7.5


@lru_cache
def missing(device: torch.device) -> str | None:
    """Why this device cannot run these operations as far as is known without a launch, or None."""
    if device.type != "cuda":
        return "only on CUDA GPUs"
    if torch.version.hip is not None:
        return "not tried on AMD GPUs"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return "the GPU is older than compute capability 8.0"
    return unusable()


@lru_cache
def unusable() -> str | None:
    """Why Triton cannot be used in this process, or None."""
    try:
        from . import ops as triton_ops  # noqa: F401
    except ModuleNotFoundError as error:
        return "Triton is not installed" if error.name == "triton" else f"Triton cannot be imported ({error})"
    except Exception as error:  # a Triton that does not fit this torch or system fails in many ways
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    return None


def unsafe(geometry: Geometry) -> str | None:
    """Why a layer is left to others, or None."""
    return "grouped convolution" if geometry.groups != 1 else None


def prepare(codes: Tensor, scale: Tensor, geometry: Geometry, sums: Tensor | None = None) -> Prepared:
    """As `reference.prepare`. Nothing is copied of codes in channels_last order with a multiple of 16 channels."""
    from .launch import Prepared, round_up

    sums = code_sums(codes) if sums is None else sums
    columns = codes.permute(0, 2, 3, 1) if geometry.is_conv else codes
    more = round_up(columns.shape[-1]) - columns.shape[-1]
    flat = (F.pad(columns, (0, more)) if more else columns).reshape(codes.shape[0], -1).contiguous()
    return Prepared(flat, scale.contiguous(), sums, None, None, 0, geometry)


def view(weight: Prepared) -> Tensor:
    """The codes that `prepare` was given, int8 of the weight's shape, in the memory of `weight`."""
    shape = weight.geometry.shape
    if not weight.geometry.is_conv:
        return weight.codes[:, : shape[1]]
    n, c, height, width = shape
    return weight.codes.view(n, height, width, -1)[..., :c].permute(0, 3, 1, 2)


def prepare_packed(packed: Packed, geometry: Geometry, sums: Tensor | None = None) -> Prepared:
    """A weight in 4 bits, kept as it is. sums: as in `prepare`."""
    from .launch import Prepared

    grid = packed.grid
    sums = code_sums(packed.int8()) if sums is None else sums
    return Prepared(
        packed.codes.contiguous(), grid.scale.contiguous(), sums, grid.factor.contiguous(), grid.zero.contiguous(),
        grid.group, geometry,
    )  # fmt: skip


def linear_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """As `reference.linear_static`."""
    from . import ops as triton_ops

    return triton_ops.run("linear_static", x, *triton_ops.flat(weight), *grid, bias)


def linear_dynamic(
    x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bias: Tensor | None, bits: int = 8
) -> Tensor:
    """As `reference.linear_dynamic`."""
    from . import ops as triton_ops

    return triton_ops.run("linear_dynamic", x, *triton_ops.flat(weight), inverse_balance, bias, bits)


def quantize_static(x: Tensor, weight: Prepared, grid: StaticInput) -> Codes:
    """As `reference.quantize_static`; not under torch.compile."""
    from . import launch

    q = launch.quantize_matrix(x.reshape(-1, x.shape[-1]), grid, weight.channels)
    return Codes(q, grid, None, None, x.shape, x.dtype)


def quantize_dynamic(x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bits: int = 8) -> Codes:
    """As `reference.quantize_dynamic`; not under torch.compile."""
    from . import launch

    rows = launch.quantize_rows(x.reshape(-1, x.shape[-1]), inverse_balance, bits, weight.channels)
    return Codes(rows.codes, None, rows.scale, rows.offset, x.shape, x.dtype)


def multiply(codes: Codes, weight: Prepared, bias: Tensor | None) -> Tensor:
    """As `reference.multiply`; not under torch.compile."""
    from . import launch

    rows = None
    if codes.scale is not None and codes.offset is not None:
        rows = launch.Rows(codes.values, codes.scale, codes.offset)
    y = launch.product(codes.values, weight, codes.grid, rows, bias, codes.dtype)
    return y.view(*codes.shape[:-1], weight.scale.shape[0])


def conv2d_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """As `reference.conv2d_static`; groups == 1. The result is in channels_last order."""
    from . import ops as triton_ops

    g = weight.geometry
    place = [*g.stride, *g.padding, *g.dilation]
    return triton_ops.run("conv2d_static", x, *triton_ops.flat(weight), *grid, bias, list(g.shape), place)


def conv2d_static_normed(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None, norm: Norm) -> Tensor:
    """`conv2d_static` of SiLU(norm(x)), both in float32 with no rounding in between; x is read twice, and nothing but
    codes is written. Not under torch.compile."""
    from . import ops as triton_ops

    return triton_ops.conv2d_static_normed(x, weight, grid, bias, norm)
