"""comfy_kitchen's int8 Linear on CUDA, which comes with ComfyUI, for machines without Triton.

It quantizes every row on a symmetric grid of its own, so that only the second half of ours fits as it is. Here each row
is shifted first: by the centre of the static grid, which gives a constant of the layer for its bias, or by the centre
of the row, which gives a product of two vectors behind. So an entry of a row is rounded to 1 / 254 of the row's span
(static: of the grid's, or less), where ours takes 1 / 255, and a static grid clips nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..geometry import Codes, Geometry, StaticInput
from . import int_mm, reference
from .rates import Passes, no_int8
from .reference import Prepared

K_MULTIPLE, N_MULTIPLE = 16, 8  # of what its products take without padding the weight anew at every call
# An input: shifted (2 + 4), or balanced (2 + 4), looked through twice (4 each) and shifted (8); quantized (4 + 1) and
# multiplied (1, float16's 2 is not). An output of a per-token layer is a float32 (2 more) and added to (4 + 2).
PASSES = {"linear_static": Passes(10.0, 0.0), "linear_dynamic": Passes(26.0, 8.0)}
# Its grid is another than the reference's: both err by about 0.6 % in the trial.
TOLERANCE = 0.03


def missing(device: torch.device) -> str | None:
    """Why this device cannot run these operations as far as is known without a trial, or None."""
    return no_int8(device) or unusable()


@lru_cache
def unusable() -> str | None:
    """Why comfy_kitchen's CUDA kernels cannot be used in this process, or None."""
    try:
        from comfy_kitchen.registry import registry

        found = registry.list_backends()["cuda"]
    except ModuleNotFoundError:
        return "comfy_kitchen is not installed"
    except Exception as error:  # an optional package of any version
        return f"comfy_kitchen cannot be used ({type(error).__name__}: {error})"
    if not found.get("available"):
        return f"comfy_kitchen has no CUDA kernels here ({found.get('unavailable_reason')})"
    if found.get("disabled"):
        return "comfy_kitchen's CUDA kernels are switched off: ComfyUI wants a PyTorch for CUDA 13"
    if "int8_linear" not in found.get("capabilities", ()):
        return "this comfy_kitchen has no int8 Linear for CUDA"
    return None


def unsafe(geometry: Geometry) -> str | None:
    """Why a layer is left to others, or None."""
    if geometry.shape[1] % K_MULTIPLE or geometry.shape[0] % N_MULTIPLE:
        return f"channels that are no multiple of {K_MULTIPLE}"
    return None


@lru_cache
def _int8_linear(kind: str) -> Callable[..., Tensor]:
    """kind: of the device. The CPU's is plain torch."""
    from comfy_kitchen.registry import registry

    return registry.get_implementation("int8_linear", backend="cuda" if kind == "cuda" else "eager")


def prepare(codes: Tensor, scale: Tensor, geometry: Geometry, sums: Tensor | None = None) -> Prepared:
    """As `reference.prepare`."""
    return reference.prepare(codes.contiguous(), scale, geometry, sums)


def view(weight: Prepared) -> Tensor:
    """The codes that `prepare` was given, in the memory of `weight`."""
    return weight.codes


def linear_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """As `reference.linear_static`, on the grids above."""
    if torch.compiler.is_compiling():
        return int_mm.linear_static(x, _plain(weight), grid, bias)
    return multiply(quantize_static(x, weight, grid), weight, bias)


def linear_dynamic(
    x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bias: Tensor | None, bits: int = 8
) -> Tensor:
    """As `reference.linear_dynamic`, on the grids above; bits: 8, whatever is asked for."""
    if torch.compiler.is_compiling():
        return int_mm.linear_dynamic(x, _plain(weight), inverse_balance, bias, bits)
    return multiply(quantize_dynamic(x, weight, inverse_balance, bits), weight, bias)


def quantize_static(x: Tensor, weight: Prepared, grid: StaticInput) -> Codes:
    """The shifted rows, float32 [M, K], and the shift, float32 [1]."""
    rows = x.reshape(-1, x.shape[-1])
    shift = grid.scale * (127.5 - grid.zero_point)
    if grid.inverse_balance is None:
        shifted = rows - shift
    else:
        shifted = torch.addcmul(-shift, rows, grid.inverse_balance)
    return Codes(shifted, grid, None, shift, x.shape, x.dtype)


def quantize_dynamic(x: Tensor, weight: Prepared, inverse_balance: Tensor | None, bits: int = 8) -> Codes:
    """The shifted rows, float32 [M, K], and the shifts, float32 [M, 1]."""
    rows = x.reshape(-1, x.shape[-1]).float()
    if inverse_balance is not None:
        rows = rows * inverse_balance
    shift = (rows.amax(1, keepdim=True) + rows.amin(1, keepdim=True)) / 2
    return Codes(rows - shift, None, None, shift, x.shape, x.dtype)


def multiply(codes: Codes, weight: Prepared, bias: Tensor | None) -> Tensor:
    """The second half of both: bit for bit what they give."""
    assert codes.offset is not None
    ones = weight.sums.float() * weight.scale  # what an input of ones gives
    if codes.grid is not None:
        # A shift can be several times the result: bfloat16 has no digits to take it off behind.
        dtype = torch.float32 if codes.dtype == torch.bfloat16 else codes.dtype
        constant = codes.offset * ones
        y = _run(codes, weight, constant if bias is None else constant + bias.float(), dtype)
    else:
        wide = _run(codes, weight, None if bias is None else bias.float(), torch.float32)
        y = torch.addcmul(wide, codes.offset, ones, out=torch.empty_like(wide, dtype=codes.dtype))
    return y.to(codes.dtype).view(*codes.shape[:-1], -1)


def _run(codes: Codes, weight: Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    run = _int8_linear(codes.values.device.type)
    return run(codes.values, weight.codes, weight.scale, bias=bias, out_dtype=dtype)


def _plain(weight: Prepared) -> int_mm.Prepared:
    return int_mm.prepare(*weight[:2], weight.geometry, weight.sums)
