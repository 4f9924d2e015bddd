"""GroupNorm, SiLU and quantized convolutions of a MODEL as one operation, where its backend has that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...geometry import Geometry, Norm, geometry_of
from ...kernels.table import CONV2D_STATIC, CONV2D_STATIC_NORMED, pick
from ...runtime import norm_silu_conv
from ...runtime.fused import Fused
from ...runtime.leaf import LeafCore
from ...scheme import STATIC, Plan
from ..leaf.base import HostLeaf
from ..model import PREFIX

HOST_NORM = comfy.ops.disable_weight_init.GroupNorm
HOST_NORMS = (*norm_silu_conv.NORMS, HOST_NORM.forward)
AS_IMPORTED = nn.GroupNorm.forward, HOST_NORM.forward_comfy_cast_weights


def attach(patcher: ModelPatcher, plan: Plan) -> None:
    """Patch every nn.Sequential with such a chain that the plan quantizes."""
    device = torch.device(patcher.load_device)
    network = patcher.model.diffusion_model
    ready = {
        module for path, module in network.named_modules()
        if path in plan.layers and plan.layers[path].activation == STATIC and _can(module, device)
    }  # fmt: skip
    for path, module in network.named_modules():
        if type(module) is nn.Sequential:
            layers = list(module)
            if any(norm_silu_conv.end(layers, at, ready.__contains__, HOST_NORMS) > at for at in range(len(layers))):
                patcher.add_object_patch(f"{PREFIX}{path}.forward", _fused(module))


def _fused(sequence: nn.Sequential) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        # AnimateDiff-Evolved replaces these while it samples: a norm over all frames.
        if (nn.GroupNorm.forward, HOST_NORM.forward_comfy_cast_weights) != AS_IMPORTED:
            return nn.Sequential.forward(sequence, x)
        return norm_silu_conv.run(sequence, x, _together, HOST_NORMS)

    return forward


def _can(module: nn.Module, device: torch.device) -> bool:
    """module: the leaf, or the layer in whose place it will be."""
    if not isinstance(module, (LeafCore, nn.Conv2d)):
        return False
    geometry = module.geometry if isinstance(module, LeafCore) else geometry_of(module)
    assert isinstance(geometry, Geometry)
    return geometry.is_conv and hasattr(pick(CONV2D_STATIC, device, geometry).module, CONV2D_STATIC_NORMED)


def _together(norm: Any, leaf: HostLeaf, x: Tensor) -> Tensor:
    """The norm's parameters come as the host's own norm gets them: cast, streamed in, changed by weight functions."""
    if not isinstance(norm, HOST_NORM) or not (norm.comfy_cast_weights or norm.weight_function or norm.bias_function):
        return norm_silu_conv.together(norm, leaf, x)
    weight, bias, stream = comfy.ops.cast_bias_weight(norm, x, offloadable=True)
    if norm.weight.device != x.device:  # the leaf's own weight may be streamed into the same buffer
        weight, bias = weight.clone(), bias.clone()
    here = Norm(norm.num_groups, weight, bias, norm.eps)
    comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
    return leaf(x, Fused(here))
