"""LoRA after quantization: after every load, the patches of the patcher become residuals of the leaves.

The host merges a patch by dequantizing, adding and rounding again, which re-rounds every code and multiplies the
LoRA's error. The leaves decline that (`HostLeaf.set_weight`) and add the patch in float instead. Running at ON_LOAD
makes one rule cover every way in: another strength, another clone, a LoRA taken out, partial and dynamic loading.
"""

from __future__ import annotations

import logging
from typing import Any

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from .base import HostLeaf
from .residual import Residual


def reconcile(patcher: ModelPatcher, device: torch.device | None, *_: Any) -> None:
    """ON_LOAD callback: make the residuals of every leaf those that the patcher's patches ask for."""
    for path, module in patcher.model.named_modules():
        if not isinstance(module, HostLeaf):
            continue
        module.hooked = None
        patches = patcher.patches.get(f"{path}.weight", [])
        where = module.weight.device if device is None else device
        module.residuals = tuple(r.to(where) for r in _residuals(patches, module, f"{path}.weight"))


def unhook(patcher: ModelPatcher, hooks: Any = None) -> None:
    """ON_APPLY_HOOKS and ON_CLEANUP callback: leaves whose weight none of `hooks` patches compute in integers again."""
    on = {} if hooks is None else patcher.get_combined_hook_patches(hooks)
    for path, module in patcher.model.named_modules():
        if isinstance(module, HostLeaf) and f"{path}.weight" not in on:
            module.hooked = None


def warn_of_bypass(patcher: ModelPatcher) -> None:
    """ON_PRE_RUN callback: such a LoRA wraps the layers that stood in the network when its node ran."""
    if patcher.get_injections("bypass_lora"):
        logging.warning(
            "TFMQ: a bypass LoRA may have no effect on a quantized MODEL: load it with the ordinary LoRA node."
        )


def unhook_behind_keyframes(patcher: ModelPatcher, *_: Any) -> None:
    """ON_PREPARE_STATE callback: at a keyframe that changes a strength the host takes its hooks off without a word."""
    if patcher.hook_patches:
        unhook(patcher, patcher.current_hooks)


def _residuals(patches: list[tuple], leaf: HostLeaf, key: str) -> list[Residual]:
    if not patches:
        return []
    low_rank = [_low_rank(p, leaf) for p in patches]
    if all(r is not None for r in low_rank):
        return [r for r in low_rank if r is not None]
    # Anything else (LoHa, DoRA, plain differences, a scaled base): the difference that the host's own merge makes.
    weight = leaf.weight
    assert isinstance(weight, QuantizedTensor)
    base = weight.dequantize().float()
    merged = comfy.lora.calculate_weight(patches, base.clone(), key)
    return [Residual((merged.float() - base).to(weight.dtype))]


def _low_rank(patch: tuple, leaf: HostLeaf) -> Residual | None:
    strength, adapter, strength_model, offset, function = patch
    if strength_model != 1.0 or function is not None or type(adapter) is not LoRAAdapter:
        return None
    up, down, alpha, mid, dora_scale, reshape = (*adapter.weights, None)[:6]
    if mid is not None or dora_scale is not None or reshape is not None:
        return None
    g = leaf.geometry
    rows = None
    if offset is not None:
        if g.is_conv or offset[0] != 0:
            return None
        rows = (int(offset[1]), int(offset[2]))
    rank = down.shape[0]
    factor = float(strength) * (float(alpha) / rank if alpha is not None else 1.0)
    up = (up.float() * factor).to(torch.float32)
    if g.is_conv:
        if g.groups != 1 or down.numel() != rank * g.shape[1] * g.shape[2] * g.shape[3]:
            return None
        return Residual(_float(down).reshape(rank, *g.shape[1:]), _float(up).reshape(-1, rank, 1, 1))
    if down.numel() != rank * g.shape[1] or up.numel() != rank * (rows[1] if rows else g.shape[0]):
        return None
    return Residual(_float(down).reshape(rank, -1), _float(up).reshape(-1, rank), rows, g.shape[0])


def _float(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32) if x.dtype not in (torch.float16, torch.bfloat16) else x.detach()
