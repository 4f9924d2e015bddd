"""Feed-forward networks of a quantized MODEL on a CPU, computed in blocks of rows that stay in the cache.

Four times as wide as the network itself, what lies between their two layers is the largest tensor of a transformer
block. docs/decisions/feed-forward-in-blocks.md has the times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.modules import attention
from comfy.ldm.modules.attention import GEGLU, FeedForward
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...runtime.fused import GATED
from ...runtime.leaf import LeafCore
from ...runtime.norm_silu_conv import untouched
from ...runtime.row_blocks import gated_blocks, in_blocks, suits
from ...scheme import Plan
from ..model import PREFIX

AS_IMPORTED: Any = GEGLU.forward


def attach(patcher: ModelPatcher, plan: Plan) -> None:
    """For a MODEL that runs on a CPU; its leaves are in place."""
    if torch.device(patcher.load_device).type != "cpu":
        return
    for path, module in patcher.model.diffusion_model.named_modules():
        if type(module) is FeedForward:
            layers = [f"{path}.{name}" for name, layer in module.named_modules() if _outputs(layer)]
            if all(layer in plan.layers and suits(plan.layers[layer]) for layer in layers):
                patcher.add_object_patch(f"{PREFIX}{path}.forward", _blocked(module))


def _blocked(module: FeedForward) -> Callable[[Tensor], Tensor]:
    width = max(_outputs(layer) for layer in module.modules())

    def forward(x: Tensor) -> Tensor:
        if _gates(module):
            return in_blocks(_gated, x, *gated_blocks(width, module.net[0].proj.scheme))
        return in_blocks(module.net, x, width)

    def _gated(x: Tensor) -> Tensor:
        first, *rest = module.net
        x = first.proj(x, GATED)
        for layer in rest:
            x = layer(x)
        return x

    return forward


def _gates(module: FeedForward) -> bool:
    """Whether the first layer of the network may compute what its GEGLU makes of it."""
    if type(module.net) is not nn.Sequential or not untouched(module.net):
        return False
    first = module.net[0]
    return (
        type(first) is GEGLU
        and isinstance(first.proj, LeafCore)
        and _hosts_own(GEGLU.forward)
        and untouched(first)
        and untouched(first.proj)
    )


def _hosts_own(forward: Any) -> bool:
    """Whether no other pack replaced this, before this pack was imported or since."""
    code = getattr(forward, "__code__", None)
    return forward is AS_IMPORTED and code is not None and code.co_filename == attention.__file__


def _outputs(layer: nn.Module) -> int:
    if isinstance(layer, LeafCore):
        return layer.geometry.shape[0]
    return layer.out_features if isinstance(layer, nn.Linear) else 0
