"""The weight of a leaf as ComfyUI sees it: a QuantizedTensor that it can stream, move, clone, patch and save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams
from torch import Tensor

from ..grouped import Grid, Packed, nearest, pack, to_columns
from ..quantizer import channel_scale, dequantize_weight, per_channel, quantize_weight
from ..rotation import rotate
from ..scheme import INT
from ..solve import LayerState
from . import nf4

NAME, NAME_4 = "TFMQInt8Layout", "TFMQInt4Layout"


class Int8Layout(QuantizedLayout):
    """int8 codes [N, K, ...], one float32 scale per output channel, one balance factor per input channel."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """scale: float32 [N]. balance: float32 [K], or [1] holding 1 where the layer is not balanced. rotation: block
        size of the rotation that is folded into the codes, or 0."""

        balance: Tensor
        rotation: int = 0

        def _tensor_fields(self) -> list[str]:
            return ["scale", "balance"]

    @classmethod
    def quantize(cls, tensor: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """Float weight -> codes and parameters. With `like` (the tensor that `tensor` came from by a patch) its scale
        and balance are kept, so that every entry that the patch left alone keeps its code."""
        like: QuantizedTensor | None = options.get("like")
        if like is None:
            balance = torch.ones(1, dtype=torch.float32, device=tensor.device)
            scale = channel_scale(tensor)
        else:
            balance, scale = like._params.balance.to(tensor.device), like._params.scale.to(tensor.device)
        rotation = 0 if like is None else like._params.rotation
        balanced = tensor.float() * per_channel(balance, tensor.dim(), 1)
        if rotation:
            balanced = rotate(balanced, rotation)
        dtype = tensor.dtype if like is None else like._params.orig_dtype
        params = cls.Params(
            scale=scale, orig_dtype=dtype, orig_shape=tuple(tensor.shape), balance=balance, rotation=rotation
        )
        return quantize_weight(balanced, scale), params

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        weight = dequantize_weight(qdata, params.scale)
        if params.rotation:
            weight = rotate(weight, params.rotation)
        return weight.div_(per_channel(params.balance, weight.dim(), 1)).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        return qtensor._qdata, qtensor._params.scale, qtensor._params.balance

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        return {"": qdata, "_scale": params.scale, "_balance": params.balance}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"like": qtensor}


class Int4Layout(QuantizedLayout):
    """Packed 4-bit codes [N, K' / 2] (`grouped`), a scale per output channel, factor and zero per group."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """scale: float32 [N]. factor, zero: uint8 [N, K' / group]. balance, rotation: as in `Int8Layout`."""

        factor: Tensor
        zero: Tensor
        balance: Tensor
        rotation: int = 0

        def _tensor_fields(self) -> list[str]:
            return ["scale", "factor", "zero", "balance"]

    @classmethod
    def quantize(cls, tensor: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """Float weight -> codes on the grid of `like`, the tensor that it came from by a patch: every entry that the
        patch left alone keeps its code. Raises ValueError without `like`: a grid comes from a calibration."""
        like: QuantizedTensor | None = options.get("like")
        if like is None:
            raise ValueError("a 4-bit weight is made by TFMQ Quantize, not by a cast")
        p = like._params
        balanced = tensor.float() * per_channel(p.balance.to(tensor.device), tensor.dim(), 1)
        if p.rotation:
            balanced = rotate(balanced, p.rotation)
        scale, factor, zero = (t.to(tensor.device) for t in (p.scale, p.factor, p.zero))
        grid = Grid(scale, factor, zero, like._qdata.shape[1] * 2 // factor.shape[1])
        return pack(nearest(to_columns(balanced), grid)), p

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        weight = packed(qdata, params).dequantize()
        if params.rotation:
            weight = rotate(weight, params.rotation)
        return (weight / per_channel(params.balance, weight.dim(), 1)).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        p = qtensor._params
        return qtensor._qdata, p.scale, p.factor, p.zero, p.balance

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        return {"": qdata} | {f"_{name}": getattr(params, name) for name in params._tensor_fields()}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"like": qtensor}


register_layout_class(NAME, Int8Layout)
register_layout_class(NAME_4, Int4Layout)


def packed(qdata: Tensor, params: Any) -> Packed:
    """The weight of an `Int4Layout` as the kernels take it."""
    group = qdata.shape[1] * 2 // params.factor.shape[1]
    return Packed(qdata, Grid(params.scale, params.factor, params.zero, group), tuple(params.orig_shape))


def quantized_tensor(state: LayerState, dtype: torch.dtype) -> QuantizedTensor:
    """The weight of a solved layer; dtype: what it stands for (that of the float model)."""
    if state.scheme.weight_format != INT:
        return nf4.quantized_tensor(state, dtype)
    balance = torch.ones(1, device=state.codes.device) if state.balance is None else state.balance
    rotation = state.scheme.rotation
    if state.factor is None or state.zero is None:
        params = Int8Layout.Params(
            scale=state.scale, orig_dtype=dtype, orig_shape=state.shape, balance=balance, rotation=rotation
        )
        return QuantizedTensor(state.codes, NAME, params)
    four = Int4Layout.Params(
        scale=state.scale, orig_dtype=dtype, orig_shape=state.shape, balance=balance, rotation=rotation,
        factor=state.factor, zero=state.zero,
    )  # fmt: skip
    return QuantizedTensor(state.codes, NAME_4, four)
