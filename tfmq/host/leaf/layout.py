"""The weight of a leaf as ComfyUI sees it: a QuantizedTensor that it can stream, move, clone, patch and save."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams
from torch import Tensor

from ...formats.affine import channel_scale, dequantize_weight, per_channel, quantize_weight
from ...formats.hadamard import rotate, unrotate
from ...formats.int4 import Grid, Packed, nearest, pack, to_columns
from ...runtime.packed_codes import PackedCodes, plain
from ...scheme import INT
from ...state import TABLES, LayerState
from . import nf4

NAME, NAME_4 = "TFMQInt8Layout", "TFMQInt4Layout"


class _Layout(QuantizedLayout):
    """What both widths of codes have in common."""

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseLayoutParams):
        """scale: float32 [N]. factor, zero: uint8 [N, K' / group] of 4 bits, else None. balance: float32 [K], or [1]
        holding 1 where the layer is not balanced. permutations: integers [1, K] or [2, K] of the rotation, or [1]
        holding 0 where it has none. rotation: block size of the rotation that is folded into the codes, or 0."""

        factor: Tensor | None = None
        zero: Tensor | None = None
        balance: Tensor
        permutations: Tensor
        rotation: int = 0

        def _tensor_fields(self) -> list[str]:
            return [field.name for field in fields(self) if isinstance(getattr(self, field.name), Tensor)]

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        p = qtensor._params
        return plain(qtensor._qdata), *(getattr(p, name) for name in p._tensor_fields())

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        return {"": _plain_codes(qdata)} | {f"_{name}": getattr(params, name) for name in params._tensor_fields()}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"like": qtensor}


class Int8Layout(_Layout):
    """int8 codes, [N, K] or in the order of `stored`, a float32 scale per output channel, a balance factor per input
    channel."""

    @classmethod
    def quantize(cls, tensor: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """Float weight -> codes and parameters. With `like` (the tensor that `tensor` came from by a patch) its scale
        and balance are kept, so that every entry that the patch left alone keeps its code."""
        like: QuantizedTensor | None = options.get("like")
        if like is None:
            params = cls.Params(
                scale=channel_scale(tensor), orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape),
                **_absent(tensor.device),
            )  # fmt: skip
            return stored(quantize_weight(tensor, params.scale)), params
        params = like._params.to_device(tensor.device)
        return stored(quantize_weight(_as_multiplied(tensor, params), params.scale)), params

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        return _as_float(dequantize_weight(codes_of(plain(qdata)), params.scale), params)


class Int4Layout(_Layout):
    """Packed 4-bit codes [N, K' / 2] (`int4`), a scale per output channel, factor and zero per group."""

    @classmethod
    def quantize(cls, tensor: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """Float weight -> codes on the grid of `like`, the tensor that it came from by a patch: every entry that the
        patch left alone keeps its code. Raises ValueError without `like`: a grid comes from a calibration."""
        like: QuantizedTensor | None = options.get("like")
        if like is None:
            raise ValueError("a 4-bit weight is made by TFMQ Quantize, not by a cast")
        params = like._params.to_device(tensor.device)
        grid = packed(like._qdata, params).grid
        return pack(nearest(to_columns(_as_multiplied(tensor, params)), grid)), params

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        return _as_float(packed(qdata, params).dequantize(), params)


register_layout_class(NAME, Int8Layout)
register_layout_class(NAME_4, Int4Layout)


def stored(codes: Tensor) -> Tensor:
    """int8 codes [N, K, ...] in the order in which the host keeps and streams them: those of a convolution as
    [N, kh, kw, C], which the kernels for GPUs read as they are."""
    return reordered(codes).contiguous()


def reordered(codes: Tensor) -> Tensor:
    """`stored` without a copy."""
    if codes.dim() != 4:
        return codes
    return codes.permuted(0, 2, 3, 1) if isinstance(codes, PackedCodes) else codes.permute(0, 2, 3, 1)


def codes_of(qdata: Tensor) -> Tensor:
    """The inverse of `stored`, without a copy."""
    if qdata.dim() != 4 or isinstance(qdata, PackedCodes):
        return qdata
    return qdata.permute(0, 3, 1, 2)


def packed(qdata: Tensor, params: Any) -> Packed:
    """The weight of an `Int4Layout` as the kernels take it."""
    group = qdata.shape[1] * 2 // params.factor.shape[1]
    return Packed(qdata, Grid(params.scale, params.factor, params.zero, group), tuple(params.orig_shape))


def permutations_of(params: Any) -> Tensor | None:
    """Integers [1, K] or [2, K] of the rotation, or None."""
    return params.permutations if params.permutations.dim() == 2 else None


def _absent(device: Any) -> dict[str, Any]:
    """What stands for the parts that a layer lacks: the host wants a tensor for each field that it streams."""
    return {"balance": torch.ones(1, device=device), "permutations": torch.zeros(1, dtype=torch.int16, device=device)}


def _plain_codes(qdata: Tensor) -> Tensor:
    """As solving makes them and files hold them."""
    return codes_of(plain(qdata)).contiguous()


def _as_multiplied(weight: Tensor, params: Any) -> Tensor:
    """Float weight -> float32, as it meets the balanced and rotated input."""
    balanced = weight.float() * per_channel(params.balance.to(weight.device), weight.dim(), 1)
    return rotate(balanced, params.rotation, permutations_of(params))


def _as_float(weight: Tensor, params: Any) -> Tensor:
    """The inverse of `_as_multiplied`, in the type that the weight stands for."""
    weight = unrotate(weight, params.rotation, permutations_of(params))
    return (weight / per_channel(params.balance, weight.dim(), 1)).to(params.orig_dtype)


def quantized_tensor(state: LayerState, dtype: torch.dtype) -> QuantizedTensor:
    """The weight of a solved layer; dtype: what it stands for (that of the float model)."""
    if state.scheme.weight_format != INT:
        return nf4.quantized_tensor(state, dtype)
    parts = _absent(state.codes.device) | {n: t for n, t in state.tensors().items() if n not in ("codes", *TABLES)}
    params = _Layout.Params(orig_dtype=dtype, orig_shape=state.shape, rotation=state.scheme.rotation, **parts)
    return QuantizedTensor(stored(state.codes), NAME if state.factor is None else NAME_4, params)


def state_of(leaf: Any) -> LayerState:
    """What a leaf was made of, `quantized_tensor` undone; on the devices where it lies."""
    weight, geometry = leaf.weight, leaf.geometry
    parts = {name: getattr(weight._params, name) for name in weight._params._tensor_fields()}
    parts |= {"codes": _plain_codes(weight._qdata), "permutations": leaf.permutations}
    parts |= {name: getattr(leaf, name) for name in TABLES}
    if leaf.inverse_balance is None:
        parts["balance"] = None
    kind = "conv2d" if geometry.is_conv else "linear"
    return LayerState.from_tensors(kind, leaf.scheme, tuple(geometry.shape), parts)
