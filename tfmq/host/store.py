"""TFMQ Save and TFMQ Load: a quantized network as one file in ComfyUI's model folders.

Beside the float parameters, under the model's own names: `X.weight` int8 codes, `X.weight_scale`, `X.weight_balance`,
`X.weight_permutations`, `X.tfmq_act_scale`, `X.tfmq_act_zero_point`; for layers of the temporal path the tensors of a
`TemporalState`. Linear layers also carry a `X.comfy_quant` that names a format of ours, so that a host without this
pack stops with an error instead of taking codes for weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..errors import TfmqError
from ..files import MANIFEST, MODEL, PAIRS, read_manifest, read_tensors, smallest_exact, write
from ..geometry import Geometry, geometry_of
from ..runtime.run_state import RunState
from ..scheme import INT, Plan, Scheme
from ..state import TENSORS, LayerState
from ..temporal import table as saved_table
from ..timeline import Partition, TimeAxis
from .leaf import nf4
from .leaf.layout import state_of
from .leaf.leaf import make_leaf
from .model import PREFIX, release, sampling_kind
from .quantized import Quantized, attach, require_quantized
from .temporal import table as temporal_table
from .temporal.leaf import TemporalLinear, finite_set_clock, from_file, to_file

FOLDER = "diffusion_models"
NAMES = {name: f"weight_{name}" for name in TENSORS} | {
    "codes": "weight", "act_scale": "tfmq_act_scale", "act_zero_point": "tfmq_act_zero_point",
}  # fmt: skip


def save(
    patcher: ModelPatcher,
    filename_prefix: str,
    temporal_as: str = temporal_table.WEIGHTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a quantized MODEL. LoRAs that came after quantization are not part of it. Returns the file.

    temporal_as: whether temporal layers in float go in by their weights or as a table over the timestep, which a MODEL
    that has one already keeps. progress: of making the table, called with (done, total).
    Raises TfmqError for a MODEL that is not ours, temporal layers that no table can stand for, or a folder that cannot
    be written.
    """
    quantized = require_quantized(patcher)
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_folder_paths(FOLDER)[0]
    )
    path = Path(folder) / f"{name}_{counter:05}_.safetensors"
    release(patcher)
    baked = patcher.clone()
    baked.patches = {key: baked.patches[key][:count] for key, count in quantized.baked.items()}
    table, after = temporal_table.of(patcher), quantized.bytes_after
    if table is None and temporal_as == temporal_table.TABLE:
        table = temporal_table.make(patcher, baked, quantized.clock.axis, progress)
        after += table.curve.nbytes - table.nbytes_removed
    tensors: dict[str, Tensor] = {} if table is None else table.tensors()
    elsewhere = set(quantized.plan.layers) | (set() if table is None else set(table.layers))
    temporal: dict[str, Any] = {}
    for layer in quantized.plan.temporal:
        leaf = patcher.get_model_object(PREFIX + layer)
        if isinstance(leaf, TemporalLinear):
            temporal[layer], found = to_file(layer, leaf)
            tensors |= found
            if leaf.bias is not None:
                tensors[f"{layer}.bias"] = smallest_exact(leaf.bias.detach())
            tensors[f"{layer}.comfy_quant"] = _marker("int8")
    for key in patcher.model.diffusion_model.state_dict():
        if key.rpartition(".")[0] not in elsewhere and key.rpartition(".")[0] not in temporal:
            comfy.model_management.throw_exception_if_processing_interrupted()
            weight = baked.patch_weight_to_device(PREFIX + key, device_to=patcher.load_device, return_weight=True)
            tensors[key] = smallest_exact(weight.detach().cpu())
    for layer in quantized.plan.layers:
        tensors |= _layer_tensors(layer, _leaf(patcher, layer))
    # The markers of v-prediction and its kin stand beside the network's own keys.
    known = patcher.model.state_dict_for_saving({})
    tensors |= {key: value for key, value in known.items() if isinstance(value, Tensor)}
    manifest: dict[str, Any] = {
        "kind": MODEL,
        "plan": quantized.plan.to_json(),
        "kinds": quantized.kinds,
        "model": quantized.model,
        "sampling": quantized.sampling,
        "axis": [quantized.clock.axis.low, quantized.clock.axis.high],
        "edges": list(quantized.clock.partition.edges),
        "shapes": {layer: list(_leaf(patcher, layer).geometry.shape) for layer in quantized.plan.layers},
        "bytes": [quantized.bytes_before, after],
        "temporal": temporal,
        "deaf": list(quantized.deaf),
        "config": _from_header(patcher),
    }
    if any(about["bits"] == 4 for about in temporal.values()):
        manifest["version"] = PAIRS
    if table is not None:
        manifest[saved_table.MANIFEST] = table.manifest()
    write(path, tensors, manifest)
    return path


def _from_header(patcher: ModelPatcher) -> dict[str, Any]:
    """Of a transformer's configuration, what the host does not find by the weights: it stood in the header of the
    original file."""
    config = patcher.model.model_config.unet_config
    if "image_model" not in config:
        return {}
    try:
        found = comfy.model_detection.detect_unet_config(patcher.model.diffusion_model.state_dict(), "") or {}
    except (KeyError, IndexError):  # layers that are a table have no shape
        found = {}
    kinds = str, int, float, bool, list, tuple, type(None)
    plain = {k: v for k, v in config.items() if isinstance(v, kinds) and k not in ("image_model", "model_type")}
    return {k: v for k, v in plain.items() if k not in found or found[k] != v}


def _leaf(patcher: ModelPatcher, layer: str) -> Any:
    return patcher.get_model_object(PREFIX + layer)


def _layer_tensors(path: str, leaf: Any) -> dict[str, Tensor]:
    found = {NAMES[name]: tensor for name, tensor in state_of(leaf).tensors().items()}
    if leaf.bias is not None:
        found["bias"] = smallest_exact(leaf.bias.detach())
    if not leaf.geometry.is_conv:
        form = leaf.scheme.weight_format
        found["comfy_quant"] = _marker(f"int{leaf.scheme.weight_bits}" if form == INT else form)
    return {f"{path}.{name}": value for name, value in found.items()}


def _marker(form: str) -> Tensor:
    return torch.tensor(list(json.dumps({"format": f"tfmq_{form}"}).encode()), dtype=torch.uint8)


def load(path: str, disable_dynamic: bool = False) -> ModelPatcher:
    """Load a file of `save` as a MODEL, without calibrating. Also the host's way to load it again.

    Raises TfmqError for a truncated, foreign or newer file, or a model type that this host does not know.
    """
    file = Path(path)
    manifest = read_manifest(file, MODEL)
    tensors = read_tensors(file)
    table = saved_table.taken_from(manifest, tensors)
    try:
        plan = Plan.from_json(manifest["plan"])
        kinds = {layer: str(manifest["kinds"][layer]) for layer in plan.layers}
        clock = RunState(TimeAxis(*manifest["axis"]), Partition(tuple(manifest["edges"])))
        states = {
            layer: _state(file, layer, kinds[layer], scheme, manifest.get("shapes", {}).get(layer), tensors)
            for layer, scheme in plan.layers.items()
        }
        before, after = manifest["bytes"]
        deaf = tuple(str(name) for name in manifest.get("deaf", ()))
        version = int(manifest["version"])
        temporal = {
            layer: from_file(layer, about, tensors, version) for layer, about in manifest.get("temporal", {}).items()
        }
        for layer in temporal:
            tensors.pop(f"{layer}.comfy_quant", None)
    except (KeyError, TypeError, ValueError) as error:
        raise TfmqError(f"{file.name} does not hold what its manifest says: get or make it again.") from error
    stands_for: dict[str, Tensor] = {}
    if table is not None:
        stands_for = table.placeholders
        why = saved_table.reason(table)
        plan = replace(plan, left={layer: why if layer in table.layers else left for layer, left in plan.left.items()})
    layers = {*plan.layers, *temporal, *(() if table is None else table.layers)}
    nf4.require_for(plan, comfy.model_management.get_torch_device())
    header = {"config": json.dumps({"transformer": manifest["config"]})} if manifest.get("config") else None
    patcher = _build(file, tensors | stands_for, layers, header, disable_dynamic)
    network = patcher.model.diffusion_model
    for layer, state in states.items():
        module = network.get_submodule(layer)
        geometry = geometry_of(module)
        assert isinstance(geometry, Geometry)
        bias = tensors.get(f"{layer}.bias")
        if bias is not None:
            bias = bias.to(module.weight.dtype)
        leaf = make_leaf(module, state, geometry, clock, bias, module.weight.dtype)
        comfy.utils.set_attr(patcher.model, PREFIX + layer, leaf.to(patcher.offload_device))
    temporal_clock = None
    for layer, temporal_layer in temporal.items():
        temporal_clock = temporal_clock or finite_set_clock(clock.axis, temporal_layer.points)
        dtype, bias = network.get_submodule(layer).weight.dtype, tensors.get(f"{layer}.bias")
        leaf = TemporalLinear(temporal_layer, temporal_clock, None if bias is None else bias.to(dtype), dtype)
        comfy.utils.set_attr(patcher.model, PREFIX + layer, leaf.to(patcher.offload_device))
    quantized = Quantized(
        plan, kinds, manifest["model"], manifest["sampling"], clock, before, after, {}, temporal_clock, deaf
    )  # fmt: skip
    table_bytes = 0
    if table is not None:
        temporal_table.attach(patcher, table)
        table_bytes = table.curve.nbytes
    attach(patcher, quantized, comfy.model_management.module_size(patcher.model) + table_bytes)
    patcher.cached_patcher_init = (load, (path,))
    return patcher


def _state(
    file: Path, layer: str, kind: str, scheme: Scheme, shape: list[int] | None, tensors: dict[str, Tensor]
) -> LayerState:
    """Takes a layer out of the tensors of a file. What is left of a packed weight is its shape: the host tells a model
    by that."""
    codes = tensors[f"{layer}.weight"]
    whole = tuple(int(n) for n in shape or codes.shape)
    found = {name: tensors.pop(f"{layer}.{key}", None) for name, key in NAMES.items()}
    tensors.pop(f"{layer}.comfy_quant", None)
    tensors[f"{layer}.weight"] = codes if scheme.weight_bits == 8 else torch.zeros((), dtype=torch.int8).expand(whole)
    try:
        return LayerState.from_tensors(kind, scheme, whole, found)
    except KeyError as error:
        name = error.args[0]
        raise TfmqError(f"{file.name} lacks the {name} of layer {layer}: get or make the file again.") from None


def _build(
    file: Path, tensors: dict[str, Tensor], layers: set[str], header: dict[str, str] | None, disable_dynamic: bool
) -> ModelPatcher:
    """The host's own model with its float parameters in place and placeholders for `layers`. header: what it wants to
    know of the original file's."""
    config = comfy.model_detection.model_config_from_unet(tensors, "", metadata=header)
    if config is None:
        raise TfmqError(
            f"This ComfyUI does not know the type of model in {file.name}: update ComfyUI to at least the version that "
            "saved it."
        )
    floats = {k: v for k, v in tensors.items() if k.rpartition(".")[0] not in layers}
    dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(tensors),
        supported_dtypes=list(config.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(floats),
    )
    patcher = comfy.sd.load_diffusion_model_state_dict(
        dict(tensors), model_options={"custom_operations": _placeholders(layers), "dtype": dtype},
        metadata=header, disable_dynamic=disable_dynamic,
    )  # fmt: skip
    missing = [layer for layer in layers if not _has(patcher.model.diffusion_model, layer)]
    if missing:
        raise TfmqError(f"{file.name} has a layer {missing[0]} that this ComfyUI's model lacks: update ComfyUI.")
    return patcher


def _has(network: nn.Module, path: str) -> bool:
    try:
        network.get_submodule(path)
    except AttributeError:
        return False
    return True


def _placeholders(layers: set[str]) -> type:
    """The host's operations, but the layers at these paths take nothing from the state dict: leaves replace them."""

    class Operations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
                if prefix[:-1] not in layers:
                    super()._load_from_state_dict(state_dict, prefix, *args)

        class Conv2d(comfy.ops.manual_cast.Conv2d):
            def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
                if prefix[:-1] not in layers:
                    super()._load_from_state_dict(state_dict, prefix, *args)

    return Operations


def receipt(path: Path) -> str:
    """What a person is told about a saved file: where it lies, and how good its temporal table is if it has one."""
    table = read_manifest(path, MODEL).get(saved_table.MANIFEST)
    return str(path) if table is None else f"{path}\n{saved_table.describe(table)}"


def sampling_warning(patcher: ModelPatcher) -> str | None:
    """A sentence if the loaded MODEL samples in another way than the calibrated one did."""
    quantized, kind = require_quantized(patcher), sampling_kind(patcher)
    if quantized.sampling == kind:
        return None
    return (
        f"calibrated with {quantized.sampling}, loads as {kind}: put the model sampling node that the original "
        "workflow used behind this one"
    )


def saved_models() -> list[str]:
    """Names of the files in the host's diffusion model folders that TFMQ Save wrote."""
    names = []
    for name in folder_paths.get_filename_list(FOLDER):
        path = folder_paths.get_full_path(FOLDER, name)
        if path and name.endswith(".safetensors") and _is_ours(path):
            names.append(name)
    return names


def _is_ours(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return 0 < size < 1 << 27 and f'"{MANIFEST}"'.encode() in file.read(min(size, 1 << 27))
    except OSError:
        return False


def stamp(path: str | None) -> str:
    """Changes when the file does."""
    if path is None:
        return "missing"
    about = Path(path).stat()
    return f"{about.st_mtime_ns} {about.st_size}"
