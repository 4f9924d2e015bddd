"""What is timed: one UNet with random weights in every representation, as functions of no argument.

Everything here needs torch alone, but for the contenders that are somebody else's: they are left out, with a sentence,
where their package is missing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.speed import unet
from devkit import inprocess
from tfmq.decide.plan import decide
from tfmq.errors import TfmqError
from tfmq.files import read_calibration, write_calibration
from tfmq.geometry import Geometry, geometry_of
from tfmq.kernels.table import costs_of
from tfmq.observe.calibration import Calibration
from tfmq.observe.model import ModelObserver
from tfmq.runtime import norm_silu_conv
from tfmq.runtime.fused import GATED
from tfmq.runtime.key_padding import whole_vectors
from tfmq.runtime.leaf import LeafCore, QuantConv2d, QuantLinear
from tfmq.runtime.packed_codes import PackedCodes
from tfmq.runtime.row_blocks import gated_blocks, in_blocks, suits
from tfmq.runtime.run_state import RunState
from tfmq.scheme import PRESETS
from tfmq.solve.layer import solve_layer
from tfmq.temporal.tib import boundary_layers, find_tib
from tfmq.timeline import Clock, Partition, TimeAxis

BATCH = 2
INTERVALS = 1  # of the time axis: random weights have no course over time
OURS = "ours_w8a8"
HOST = "host_int8_convrot"


class Missing(Exception):
    """This contender cannot run here, and why."""


@dataclass(frozen=True)
class Contender:
    """`step`: one call of the network. `resident`: bytes of everything that it keeps. `notes`: for people."""

    step: Callable[[], Any]
    resident: int
    notes: str = ""


def default_contenders(device: torch.device) -> list[str]:
    if device.type == "cpu":
        return [OURS, "ours_w4a8", "fp32", "bf16", "bf16_compiled", HOST, "openvino_fp32", "openvino_int8"]
    return [OURS, "ours_w4a8", "fp32", "fp16", "fp16_compiled", "bf16", "bf16_compiled", HOST]


def build(name: str, model: str, device: torch.device, cache: Path) -> Contender:
    """Raises Missing. cache: a folder for calibrations and converted networks, so that a second run starts sooner."""
    config = unet.config_of(model)
    if name.startswith("openvino"):
        return _openvino(name, config, cache / model)
    if name.startswith("ours"):
        return _ours("W8A8" if name == OURS else "W4A8", config, device, cache / model)
    if name == HOST:
        return _host(config, device)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    kind, _, compiled = name.partition("_")
    if kind not in dtypes:
        raise Missing(f"there is no contender {name}")
    network = float_network(config, device, dtypes[kind])
    run: Any = torch.compile(network) if compiled else network
    inputs = unet.inputs(config, BATCH, dtypes[kind], device)
    return Contender(lambda: run(*inputs), resident(network))


def float_network(config: unet.Config, device: torch.device, dtype: torch.dtype) -> unet.UNetModel:
    """Channels last in 16 bits; in float32 as it comes, which is how the host runs it."""
    with torch.device("meta"):
        network = unet.UNetModel(config).to(dtype)
    network = network.to_empty(device=device)
    unet.fill(network)
    network = network.eval().requires_grad_(False)
    if dtype != torch.float32:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return network


def _ours(recipe: str, config: unet.Config, device: torch.device, cache: Path) -> Contender:
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    network = float_network(config, device, dtype)
    inputs = unet.inputs(config, BATCH, dtype, device)
    axis, partition = TimeAxis(0.0, 999.0), Partition.uniform(INTERVALS)
    keep = kept_in_float(network)
    layers = {path: m for path, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    file = cache.with_suffix(".calibration.safetensors")
    try:
        calibration = read_calibration(file)
    except TfmqError:
        watched = [(path, module) for path, module in layers.items() if path not in keep]
        calibration = _observe(network, watched, Clock(axis, partition), inputs)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_calibration(file, calibration)
    kinds = {path: "conv2d" if isinstance(m, nn.Conv2d) else "linear" for path, m in layers.items()}
    geometries = [g for g in map(geometry_of, layers.values()) if isinstance(g, Geometry)]
    plan = decide(PRESETS[recipe], calibration, kinds, keep, costs_of(device, geometries))
    clock = RunState(axis, partition)
    for path, scheme in plan.layers.items():
        module = layers.pop(path)
        state = solve_layer(scheme, calibration.layers[path], module.weight, plan.recipe.ranges)
        leaf = QuantConv2d if isinstance(module, nn.Conv2d) else QuantLinear
        geometry = geometry_of(module)
        assert isinstance(geometry, Geometry)
        put(network, path, leaf(state, geometry, clock, module.bias))
        del module
    clock.set(inputs[1])
    chain_norms(network)
    if device.type == "cpu":
        for part in network.modules():
            inner = [leaf.scheme for leaf in part.modules() if isinstance(leaf, LeafCore)]
            if isinstance(part, unet.FeedForward) and len(inner) == 2 and all(map(suits, inner)):
                width, least = gated_blocks(part.width, inner[0])
                run = partial(_feed_forward, *part.net)
                vars(part)["forward"] = partial(in_blocks, run, width=width, least=least)
            if isinstance(part, unet.CrossAttention):
                part.attention = _attention
    labels = [scheme.label for scheme in plan.layers.values()]
    notes = ", ".join(f"{labels.count(label)} {label}" for label in sorted(set(labels)))
    network(*inputs)  # packs the weights
    gc.collect()
    return Contender(lambda: network(*inputs), resident(network), f"{notes}; {len(plan.left)} in float")


def kept_in_float(network: nn.Module) -> dict[str, str]:
    """Path of each layer that no recipe quantizes -> why."""
    keep = dict.fromkeys(find_tib(network).layers, "temporal path")
    return keep | {path: f"{which} layer" for path, which in boundary_layers(network).items()}


def put(network: nn.Module, path: str, layer: nn.Module) -> None:
    """Set the layer of that path."""
    parent, _, own = path.rpartition(".")
    setattr(network.get_submodule(parent), own, layer)


def chain_norms(network: nn.Module) -> None:
    """Each norm and SiLU before a convolution in one, as tfmq.host.faster.norms has it."""
    for part in network.modules():
        if isinstance(part, unet.ResBlock):
            for layers_in_turn in (part.in_layers, part.out_layers):
                vars(layers_in_turn)["forward"] = partial(norm_silu_conv.run, layers_in_turn)


def _feed_forward(first: Any, _dropout: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    """As tfmq.host.faster.feed_forward has it."""
    y: Tensor = second(first.proj(x, GATED))
    return y


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As tfmq.host.faster.attention has it."""
    mask = None
    padded = whole_vectors(q, k, v)
    if padded is not None:
        k, v, mask = padded
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _observe(
    network: nn.Module, layers: Iterable[tuple[str, nn.Module]], clock: Clock, inputs: tuple[Any, ...]
) -> Calibration:
    observer = ModelObserver(layers, clock)
    with observer:
        for stage in range(2):
            observer.start_call(inputs[1])
            network(*inputs)
            if stage == 0:
                observer.end_first_stage()
    return Calibration("random weights", "", clock.axis, clock.partition, observer.statistics(), {})


def _host(config: unet.Config, device: torch.device) -> Contender:
    """All Linear layers that ours quantizes in the host's own rotated int8; the rest as it was."""
    try:
        inprocess.use_host(device.type)
        from bench.quality.host_formats import int8_linear
    except (ImportError, FileNotFoundError) as error:
        raise Missing(f"no ComfyUI: {error}") from None
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    network = float_network(config, device, dtype)
    keep = {*find_tib(network).layers, *boundary_layers(network)}
    linears = {path: m for path, m in network.named_modules() if isinstance(m, nn.Linear) and path not in keep}
    for path, module in linears.items():
        put(network, path, int8_linear(module, True, dtype).to(device))
    inputs = unet.inputs(config, BATCH, dtype, device)
    gc.collect()
    return Contender(lambda: network(*inputs), resident(network), f"{len(linears)} layers int8")


def _openvino(name: str, config: unet.Config, cache: Path) -> Contender:
    try:
        import openvino
    except ImportError:
        raise Missing("openvino is not installed") from None
    core = openvino.Core()
    kind = name.removeprefix("openvino_")
    inputs = [x for x in unet.inputs(config, BATCH, torch.float32, torch.device("cpu")) if x is not None]
    file = _openvino_file(kind, config, inputs, cache, openvino)
    # It may choose the precision between the integer layers itself; of fp32 it may not make anything else.
    hint = {"INFERENCE_PRECISION_HINT": "f32"} if kind == "fp32" else {}
    compiled = core.compile_model(file, "CPU", {"PERFORMANCE_HINT": "LATENCY", **hint})
    arrays = [x.numpy() for x in inputs]
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    size = file.with_suffix(".bin").stat().st_size
    return Contender(lambda: compiled(arrays), size, f"OpenVINO {openvino.__version__}, {precision} between layers")


def _openvino_file(kind: str, config: unet.Config, inputs: list[Tensor], cache: Path, openvino: Any) -> Path:
    """The converted network; int8 by NNCF's own post-training quantization of the float one, on one sample."""
    file = cache.with_suffix(f".{kind}.xml")
    if file.is_file():
        return file
    if kind == "fp32":
        network = float_network(config, torch.device("cpu"), torch.float32)
        with torch.inference_mode(False), torch.no_grad():
            model = openvino.convert_model(network, example_input=tuple(inputs))
        del network
    else:
        try:
            import nncf
        except ImportError:
            raise Missing("nncf is not installed") from None
        whole = _openvino_file("fp32", config, inputs, cache, openvino)
        data = nncf.Dataset([[x.numpy() for x in inputs]])
        model = nncf.quantize(
            openvino.Core().read_model(whole), data, subset_size=1, model_type=nncf.ModelType.TRANSFORMER
        )
    gc.collect()
    file.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, file, compress_to_fp16=False)
    return file


def resident(network: nn.Module) -> int:
    """Bytes of all tensors that hang on a network, a kernel's own form of a weight included, each storage once."""
    total, seen = 0, set()
    for tensor in _tensors(network):
        if isinstance(tensor, PackedCodes):
            continue  # the prepared form is counted
        if tensor.layout != torch.strided:  # oneDNN's own: its storage cannot be asked
            total += tensor.numel() * tensor.element_size()
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    for parameter in network.parameters():
        if hasattr(parameter, "layout_cls"):  # the host's: a record of tensors
            from bench.quality.host_formats import tensors_in

            yield from tensors_in(parameter)
        else:
            yield parameter
    yield from network.buffers()
    for module in network.modules():
        if isinstance(module, LeafCore) and module._prepared is not None:
            ready = module._prepared[2]
            parts = ready if isinstance(ready, tuple) else vars(ready).values()
            for part in parts:
                yield from (one for one in (part if isinstance(part, tuple) else (part,)) if isinstance(one, Tensor))
