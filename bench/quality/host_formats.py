"""Formats that others have for Linear layers, on a MODEL: what ours is compared with.

The host's own are computed by the host's own layers, NF4 by the functions of bitsandbytes.
"""

from __future__ import annotations

import gc
import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from functools import cache

import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn
from torch.nn import functional as F

PREFIX = "diffusion_model."
# The Hadamard sizes that all of the format's kernels take (comfy_kitchen 0.2.26, backends cuda and hip).
ROTATIONS = (256, 64, 16)
W4A4_GROUP = 64  # input channels must divide into these for the host's 4-bit product
BLOCK = 64  # weights of a scale in NF4, the default of bitsandbytes


def int8_model(patcher: ModelPatcher, paths: Iterable[str], rotated: bool) -> ModelPatcher:
    """A clone with the given Linear layers in the host's `int8_tensorwise` format: weights symmetric with one scale
    per output channel, activations symmetric per token at run time.

    paths: relative to the diffusion model. rotated: the format's `convrot`, an orthogonal Hadamard rotation of groups
    of input channels, in the largest group that divides a layer's inputs; none where none does.
    The patcher's model must be in float and hold no patches.
    """
    return _replaced(patcher, paths, lambda linear: int8_linear(linear, rotated))


def w4a4_model(patcher: ModelPatcher, paths: Iterable[str]) -> tuple[ModelPatcher, list[str]]:
    """The same in the host's `convrot_w4a4`: rotated by Hadamard blocks, weights of 4 bits with one scale per output
    channel, activations of 4 bits per token. Also those of `paths` that its kernel cannot take, which stay in float."""
    network = patcher.model.diffusion_model
    taken: list[str] = []
    left: list[str] = []
    for path in paths:
        (left if network.get_submodule(path).weight.shape[1] % W4A4_GROUP else taken).append(path)
    return _replaced(patcher, taken, _w4a4_linear), left


def nf4_model(patcher: ModelPatcher) -> ModelPatcher:
    """A clone with all Linear layers in NF4 with nested statistics, as `bitsandbytes.nn.Linear4bit` makes them."""
    _release(patcher)
    network = patcher.model.diffusion_model
    paths = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    return _replaced(patcher, paths, Nf4Linear)


def _replaced(patcher: ModelPatcher, paths: Iterable[str], make: Callable[[nn.Linear], nn.Module]) -> ModelPatcher:
    _release(patcher)
    clone = patcher.clone()
    for path in paths:
        module = patcher.model.diffusion_model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        clone.add_object_patch(PREFIX + path, make(module))
    # Without a new one the host takes the layers for loaded.
    clone.patches_uuid = uuid.uuid4()
    return clone


def _release(patcher: ModelPatcher) -> None:
    """Another clone may have its layers in the shared network at this moment."""
    gc.collect()  # a model that dies while the host walks over its list would shift it
    comfy.model_management.unload_model_and_clones(patcher)


def rotation_of(inputs: int) -> int | None:
    """The group size for a layer, or None."""
    return next((size for size in ROTATIONS if inputs % size == 0), None)


def int8_linear(module: nn.Linear, rotated: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One such layer; dtype: what it computes in around the integer product."""
    weight = module.weight.detach().float()
    options: dict[str, object] = {"format": "int8_tensorwise"}
    group = rotation_of(weight.shape[1]) if rotated else None
    if group is not None:
        options |= {"convrot": True, "convrot_groupsize": group}
    rotation = {k: v for k, v in options.items() if k != "format"}
    codes = QuantizedTensor.from_float(weight, "TensorWiseINT8Layout", per_channel=True, **rotation)
    return _host_linear(module, codes, options, dtype)


def _w4a4_linear(module: nn.Linear) -> nn.Module:
    group = rotation_of(module.weight.shape[1])
    codes = QuantizedTensor.from_float(
        module.weight.detach().float(), "TensorCoreConvRotW4A4Layout", convrot_groupsize=group
    )
    return _host_linear(module, codes, {"format": "convrot_w4a4", "convrot_groupsize": group})


def _host_linear(
    module: nn.Linear, codes: QuantizedTensor, options: dict[str, object], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The host's layer for a weight in one of its formats; options: what a file says of it."""
    operations = comfy.ops.mixed_precision_ops({}, dtype)
    layer = operations.Linear(module.in_features, module.out_features, module.bias is not None, codes.device, dtype)
    state = {
        "weight": codes._qdata,
        "weight_scale": codes._params.scale,
        "comfy_quant": torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8),
    }
    if module.bias is not None:
        state["bias"] = module.bias.detach().to(dtype)
    layer.load_state_dict(state)  # the way in which the host reads such a layer from a file
    return layer


class Nf4Linear(nn.Module):
    """A Linear through the functions of bitsandbytes: NF4, the scales of 64 weights in 8 bits with scales of their own.

    Given blocks and not rows: where no block ends with a row, bitsandbytes 0.50.2 takes wrong scales on CPUs. Computes
    in the input's type; `Linear4bit` would take bfloat16 on CPUs that have it.
    """

    codes: Tensor
    scale: Tensor
    outer_scale: Tensor
    offset: Tensor
    bias: Tensor | None

    def __init__(self, module: nn.Linear) -> None:
        from bitsandbytes.functional import quantize_4bit

        super().__init__()
        self.in_features, self.out_features = module.in_features, module.out_features
        flat = module.weight.detach().float().flatten()
        blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        codes, state = quantize_4bit(blocks, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        self.register_buffer("codes", codes)
        self.register_buffer("scale", state.absmax)
        self.register_buffer("outer_scale", state.state2.absmax)
        self.register_buffer("offset", state.offset)
        bias = None if module.bias is None else nn.Parameter(module.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        device = x.device
        outer = QuantState(self.outer_scale, code=_values("dynamic", device), blocksize=256, dtype=torch.float32)
        shape = torch.Size((self.codes.numel() * 2 // BLOCK, BLOCK))
        state = QuantState(
            self.scale, shape, _values("nf4", device), BLOCK, "nf4", x.dtype, offset=self.offset, state2=outer
        )
        weight = dequantize_4bit(self.codes, state).flatten()[: self.out_features * self.in_features]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight.view(self.out_features, self.in_features), bias)


@cache
def _values(form: str, device: torch.device) -> Tensor:
    """What codes of 4 bits, or of the 8 bits of nested scales, stand for."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    return create_dynamic_map().to(device) if form == "dynamic" else get_4bit_type(form, device)


def stored_bytes(patcher: ModelPatcher) -> int:
    """Bytes of the diffusion model in a file: float parameters as float16, quantized layers with their codes, scales
    and activation tables."""
    patches = _replacements(patcher)
    total = sum(_module_bytes(module) for module in patches.values())
    for path, module in patcher.model.diffusion_model.named_modules():
        if path not in patches:
            total += sum(2 * parameter.numel() for parameter in module.parameters(recurse=False))
    return total


def _module_bytes(module: nn.Module) -> int:
    total = sum(b.nbytes for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set)
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


def resident_bytes(patcher: ModelPatcher) -> int:
    """Bytes of the diffusion model as it lies in memory after a run.

    Counted once each: the parameters in the types in which they are held, all parts of quantized weights, buffers
    (activation tables), and what our kernels made of the weights and keep (packed forms, sums). Not counted: what the
    layers allocate while they compute.
    """
    patches = _replacements(patcher)
    replaced = [m for path, m in patcher.model.diffusion_model.named_modules() if path not in patches]
    modules = [m for m in replaced if m not in set(patches.values())]
    modules += [inner for patch in patches.values() for inner in patch.modules()]
    seen: set[int] = set()
    total = 0
    for module in modules:
        held = [*module._parameters.values(), *module._buffers.values()]
        held += [tensor for tensor in vars(module).values() if isinstance(tensor, torch.Tensor)]
        held += [getattr(module, made, None) for made in ("_prepared", "_sums")]
        for tensor in tensors_in(held):
            place = id(tensor) if tensor.is_mkldnn else tensor.data_ptr()
            if place not in seen:
                seen.add(place)
                total += tensor.numel() * tensor.element_size()
    return total


def _replacements(patcher: ModelPatcher) -> dict[str, nn.Module]:
    """Path in the network -> the layer that the MODEL has there instead of the network's own."""
    patches = {p.removeprefix(PREFIX): m for p, m in patcher.object_patches.items() if p.startswith(PREFIX)}
    return {path: module for path, module in patches.items() if isinstance(module, nn.Module)}


def tensors_in(value: object) -> list[Tensor]:
    """All plain tensors in nested containers and records."""
    if isinstance(value, QuantizedTensor):
        return [value._qdata, *tensors_in([getattr(value._params, name) for name in value._params._tensor_fields()])]
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return tensors_in(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return tensors_in(vars(value)) if is_dataclass(value) else []
