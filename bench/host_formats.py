"""The host's own int8 formats on a MODEL, computed by the host's own layers: what ours is compared with."""

from __future__ import annotations

import gc
import json
import uuid
from collections.abc import Iterable

import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

PREFIX = "diffusion_model."
# The Hadamard sizes that all of the format's kernels take (comfy_kitchen 0.2.26, backends cuda and hip).
ROTATIONS = (256, 64, 16)


def int8_model(patcher: ModelPatcher, paths: Iterable[str], rotated: bool) -> ModelPatcher:
    """A clone with the given Linear layers in the host's `int8_tensorwise` format: weights symmetric with one scale
    per output channel, activations symmetric per token at run time.

    paths: relative to the diffusion model. rotated: the format's `convrot`, an orthogonal Hadamard rotation of groups
    of input channels, in the largest group that divides a layer's inputs; none where none does.
    The patcher's model must be in float and hold no patches.
    """
    # Another clone may have its layers in the shared network at this moment.
    gc.collect()  # a model that dies while the host walks over its list would shift it
    comfy.model_management.unload_model_and_clones(patcher)
    clone = patcher.clone()
    for path in paths:
        module = patcher.model.diffusion_model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        clone.add_object_patch(PREFIX + path, _int8_linear(module, rotated))
    # Without a new one the host takes the layers for loaded.
    clone.patches_uuid = uuid.uuid4()
    return clone


def rotation_of(inputs: int) -> int | None:
    """The group size for a layer with so many inputs, or None."""
    return next((size for size in ROTATIONS if inputs % size == 0), None)


def _int8_linear(module: nn.Linear, rotated: bool) -> nn.Module:
    weight = module.weight.detach()
    options: dict[str, object] = {"format": "int8_tensorwise"}
    group = rotation_of(weight.shape[1]) if rotated else None
    if group is not None:
        options |= {"convrot": True, "convrot_groupsize": group}
    rotation = {k: v for k, v in options.items() if k != "format"}
    codes = QuantizedTensor.from_float(weight, "TensorWiseINT8Layout", per_channel=True, **rotation)
    operations = comfy.ops.mixed_precision_ops({}, weight.dtype)
    layer = operations.Linear(
        module.in_features, module.out_features, module.bias is not None, weight.device, weight.dtype
    )
    state = {
        "weight": codes._qdata,
        "weight_scale": codes._params.scale,
        "comfy_quant": torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8),
    }
    if module.bias is not None:
        state["bias"] = module.bias.detach()
    layer.load_state_dict(state)  # the way in which the host reads such a layer from a file
    return layer


def stored_bytes(patcher: ModelPatcher) -> int:
    """Bytes of the diffusion model in a file: float parameters as float16, quantized layers with their codes, scales
    and activation tables."""
    patches = {p.removeprefix(PREFIX): m for p, m in patcher.object_patches.items() if p.startswith(PREFIX)}
    total = sum(_module_bytes(module) for module in patches.values())
    for path, module in patcher.model.diffusion_model.named_modules():
        if path not in patches:
            total += sum(2 * parameter.numel() for parameter in module.parameters(recurse=False))
    return total


def _module_bytes(module: nn.Module) -> int:
    total = 0
    for parameter in module.parameters(recurse=False):
        if isinstance(parameter, QuantizedTensor):
            parts = parameter.layout_cls.state_dict_tensors(parameter._qdata, parameter._params)
            total += sum(part.nbytes for part in parts.values())
        else:
            total += 2 * parameter.numel()
    for name in ("act_scale", "act_zero_point"):  # ours; the balance is among the parts of the weight
        table = getattr(module, name, None)
        total += table.nbytes if isinstance(table, Tensor) else 0
    return total
