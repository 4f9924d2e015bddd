"""Linear weights in the 4-bit formats of bitsandbytes, NF4 and FP4 (QLoRA, 2305.14314, section 3).

The codes are packed, decoded and multiplied by bitsandbytes itself, which is optional: without it these formats are
refused with a sentence, and everything else goes on working.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams
from torch import Tensor
from torch.nn import functional as F

from ...errors import TfmqError
from ...scheme import INT, Plan, Scheme
from ...state import LayerState

NAME = "TFMQBlock4Layout"
BLOCK = 64  # entries of a row-major weight that share a scale


def require(device: torch.device) -> None:
    """Raises TfmqError where bitsandbytes is missing, cannot be imported, or does not know the device."""
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
        raise TfmqError(
            f"NF4 and FP4 weights need bitsandbytes, which {why}: run `pip install bitsandbytes` with ComfyUI's Python "
            "and start ComfyUI again, or choose a recipe with integer weights."
        ) from None
    known = bitsandbytes.supported_torch_devices
    if device.type not in known:
        raise TfmqError(
            f"bitsandbytes runs on {', '.join(sorted(known))}, not on this machine's {device.type}: choose a recipe "
            "with integer weights."
        )


def require_for(plan: Plan, device: torch.device) -> None:
    """As `require`, for a plan that has a layer in one of these formats."""
    if any(scheme.weight_format != INT for scheme in plan.layers.values()):
        require(device)


class Block4Layout(QuantizedLayout):
    """Packed codes uint8 [B, 32], one row for each block of 64 entries of the row-major weight, and a scale per block.

    The last block is filled up with zeros.
    """

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """scale: float16 [B], the largest magnitude of each block. form: "nf4" or "fp4"."""

        form: str

    @classmethod
    def quantize(cls, tensor: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """Float weight [N, K] -> codes and parameters; form: "nf4" or "fp4".

        The largest entry of a block has a code of its own, so that blocks which a patch left alone keep their codes.
        """
        codes, scale = encode(tensor, options["form"])
        return codes, cls.Params(scale, tensor.dtype, tuple(tensor.shape), options["form"])

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        # As blocks, not as [N, K]: where K is no multiple of 64, bitsandbytes 0.50.2 takes wrong scales on CPUs.
        blocks = dequantize_4bit(qdata.view(-1, 1), _state(params, (qdata.shape[0], BLOCK), params.orig_dtype))
        shape = params.orig_shape
        return blocks.flatten()[: math.prod(shape)].view(shape)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        return {"": qdata, "_scale": params.scale}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"form": qtensor._params.form}


register_layout_class(NAME, Block4Layout)


def solve(scheme: Scheme, weight: Tensor) -> LayerState:
    """Encode a Linear's weight, float [N, K], in `scheme.weight_format`; the result lies on the weight's device.

    Raises FloatingPointError if the weight is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise FloatingPointError("the weight holds NaN or infinite values")
    codes, scale = encode(weight, scheme.weight_format)
    return LayerState("linear", scheme, tuple(weight.shape), codes, scale)


def encode(weight: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Float [N, K] -> codes uint8 and scales float16, as in `Block4Layout`."""
    from bitsandbytes.functional import quantize_4bit

    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    codes, state = quantize_4bit(blocks, blocksize=BLOCK, compress_statistics=False, quant_type=form)
    # 16 bits a block: their rounding is less than a hundredth of that of the codes.
    return codes.view(-1, BLOCK // 2), state.absmax.to(torch.float16)


def quantized_tensor(state: LayerState, dtype: torch.dtype) -> QuantizedTensor:
    """The weight of a solved layer; dtype: what it stands for (that of the float model)."""
    params = Block4Layout.Params(state.scale, dtype, state.shape, state.scheme.weight_format)
    return QuantizedTensor(state.codes, NAME, params)


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times a weight of this layout on its device -> [..., N], in x's dtype."""
    from bitsandbytes import matmul_4bit

    shape = weight._params.orig_shape
    if shape[1] % BLOCK:
        return F.linear(x, weight.dequantize().to(x.dtype), bias)
    return matmul_4bit(x, weight._qdata.view(-1, 1), _state(weight._params, shape, x.dtype), bias=bias)


def _state(params: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """bitsandbytes' own description of a weight of that shape."""
    from bitsandbytes.functional import QuantState

    scale = params.scale.float()
    return QuantState(scale, torch.Size(shape), _values(params.form, scale.device), BLOCK, params.form, dtype)


@cache
def _values(form: str, device: torch.device) -> Tensor:
    """What the 16 codes stand for; kept, since making it means a transfer to the device."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(form, device, blocksize=BLOCK)
