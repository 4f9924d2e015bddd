"""The real weights of a layer whose module is not loaded, on a device for the length of a computation."""

from __future__ import annotations

import copy

from comfy.model_patcher import LowVramPatch, ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ..leaf.base import HOST_STATE


def twin(module: nn.Module, key: str, patcher: ModelPatcher, like: Tensor) -> nn.Module:
    """A copy of a module that owns nothing but its weights on the device of `like`, with the patches merged as the host
    merges them."""
    copied = copy.copy(module)
    copied._modules = {
        name: None if child is None else twin(child, f"{key}.{name}", patcher, like)
        for name, child in module._modules.items()
    }
    copied._buffers = {n: None if b is None else b.to(like.device) for n, b in module._buffers.items()}
    copied._parameters = {}
    for state in HOST_STATE:
        copied.__dict__.pop(state, None)
    for name, parameter in module._parameters.items():
        full = f"{key}.{name}"
        own = None if parameter is None else merged(parameter, full, patcher, like)
        copied._parameters[name] = own  # type: ignore[assignment]  # no Parameter: that needs the right inference mode
        if hasattr(module, f"{name}_function"):
            setattr(copied, f"{name}_function", list(patcher.weight_wrapper_patches.get(full, [])))
    return copied


def merged(parameter: Tensor, key: str, patcher: ModelPatcher, like: Tensor) -> Tensor:
    if key not in patcher.patches:
        return parameter.to(like.device)
    if patcher.is_dynamic() and not isinstance(parameter, QuantizedTensor):
        # Dynamic loading merges at the time of use, in the precision of the computation.
        return LowVramPatch(key, patcher.patches)(parameter.to(like.device, like.dtype, copy=True))  # type: ignore[no-any-return]
    found = patcher.patch_weight_to_device(key, device_to=like.device, return_weight=True)
    return found.to(like.device)  # type: ignore[no-any-return]
