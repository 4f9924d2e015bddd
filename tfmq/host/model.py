"""What can be said about a MODEL: is it one that we can work on, which one is it, what is its time."""

from __future__ import annotations

import gc
import hashlib
from typing import Any

import comfy.model_base
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ..errors import TfmqError
from ..timeline import TimeAxis
from .digest import SAMPLES, update_digest

PREFIX = "diffusion_model."
ATTACHMENT = "tfmq"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
COMPILED = "torch.compile"  # under which the host's own node hangs its wrapper


def diffusion_model_of(patcher: Any) -> nn.Module:
    """The network inside a MODEL. Raises TfmqError if there is none."""
    network = getattr(getattr(patcher, "model", None), "diffusion_model", None)
    if not isinstance(patcher, ModelPatcher) or not isinstance(network, nn.Module):
        raise TfmqError(
            "The model input is not a diffusion MODEL: connect the MODEL output of a checkpoint or diffusion model "
            "loader."
        )
    return network


def require_float_model(patcher: Any) -> None:
    """Leaves a MODEL in float with nothing of another clone in its network.

    Raises TfmqError if this is no diffusion model or its weights are quantized already.
    """
    network = diffusion_model_of(patcher)
    if patcher.attachments.get(ATTACHMENT) is not None:
        raise TfmqError("This MODEL is already quantized by TFMQ: connect the one that goes into TFMQ Quantize.")
    compiled = patcher.get_wrappers(WrappersMP.APPLY_MODEL, COMPILED)
    if compiled or any(
        PREFIX.startswith(f"{key}.") or (key.startswith(PREFIX) and hasattr(patch, "_orig_mod"))
        for key, patch in patcher.object_patches.items()
    ):
        raise TfmqError("This MODEL is compiled: put torch.compile behind TFMQ Quantize, not before it.")
    # Another clone may have its leaves or its merged LoRA in the shared modules at this moment.
    release(patcher)
    for path, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.Linear, nn.Conv2d)) or hasattr(module, "comfy_cast_weights"):
            kind = _quantized_kind(weight)
            if kind is not None:
                raise TfmqError(
                    f"This MODEL is already quantized ({kind} in layer {path}): load the 16-bit version of it and "
                    "quantize that."
                )


def release(patcher: ModelPatcher) -> None:
    """Take a model and its clones off the device, so that its modules hold nothing but the model's own.

    The host walks over its list of loaded models by number, and a dead model that the collector finds in the middle of
    that walk removes itself from the list: so collect before, and not meanwhile.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        comfy.model_management.unload_model_and_clones(patcher)
        # That looks at the host's own device alone; a node may have chosen another.
        base = patcher.clone_base_uuid
        loaded = list(comfy.model_management.current_loaded_models)
        left = [one for one in loaded if one.model is not None and one.model.clone_base_uuid == base]
        for device in {one.device for one in left}:
            comfy.model_management.free_memory(1e30, device, [one for one in loaded if one not in left])
    finally:
        if enabled:
            gc.enable()


def _quantized_kind(weight: Any) -> str | None:
    if isinstance(weight, QuantizedTensor):
        return weight._layout_cls
    if isinstance(weight, Tensor) and weight.dtype not in FLOATS:
        return str(weight.dtype).removeprefix("torch.")
    if isinstance(weight, Tensor) and type(weight) not in (Tensor, nn.Parameter):
        return type(weight).__name__
    return None


def time_axis(patcher: ModelPatcher) -> TimeAxis:
    """The span of the timesteps that the network can receive."""
    sampling = patcher.get_model_object("model_sampling")
    low, high = (float(sampling.timestep(torch.as_tensor(s).float())) for s in (sampling.sigma_min, sampling.sigma_max))
    return TimeAxis(min(0.0, low), high)


def sampling_kind(patcher: ModelPatcher) -> str:
    """What the network predicts and what its timesteps are, e.g. "EPS+ModelSamplingDiscrete"; no shift, no schedule."""
    local = {"ModelSampling", "ModelSamplingAdvanced", "Module", "object"}
    names = {c.__name__ for c in type(patcher.get_model_object("model_sampling")).__mro__} - local
    return "+".join(sorted(names))


def sampling_values(patcher: ModelPatcher) -> dict[str, Any]:
    """The numbers of its noise schedule, shift and all."""
    sampling = patcher.get_model_object("model_sampling")
    plain = {name: value for name, value in vars(sampling).items() if isinstance(value, (int, float, str))}
    return {**plain, **dict(sampling.named_buffers())}


def fingerprint(patcher: ModelPatcher) -> str:
    """Hash of the weights (sampled) and of the patches on them; equal after a reload, different for another LoRA."""
    digest = hashlib.sha256()
    for key, weight in sorted(patcher.model.diffusion_model.state_dict().items()):
        digest.update(f"{key}{tuple(weight.shape)}".encode())
        update_digest(digest, weight, SAMPLES)
    for key in sorted(patcher.patches, key=str):
        for strength, value, strength_model, offset, _ in patcher.patches[key]:
            digest.update(f"{key}{strength}{strength_model}{offset}".encode())
            update_digest(digest, value, SAMPLES)
    return digest.hexdigest()
