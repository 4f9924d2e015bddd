"""Temporal layers without their weights: how good the saved table is, and what it would make of real files."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.temporal.models import MODELS, build
from demo import checkpoint as demo_checkpoint
from devkit.inprocess import PACK_MODULE, load_pack
from tfmq.temporal.curve import GRID, KNOTS, LOW_RANK, POINTS, RANKS, ROWS, fit
from tfmq.temporal.features import TemporalGraph, TemporalLayer, inner_layers, sinusoid, temporal_graph
from tfmq.temporal.table import MANIFEST
from tfmq.temporal.tib import find_tib
from tfmq.timeline import TimeAxis

TINY = ("AuraFlow", "Qwen-Image", "Wan2.1", "Lumina2", "Z-Image")
REAL = ("SD1.5", "Qwen-Image", "AuraFlow 0.2", "Lumina2", "Z-Image", "Wan2.1-14B", "PixArt-Sigma")
SAMPLERS = ("euler", "heun", "dpmpp_2m_sde")
PICTURES, CALIBRATION = 6, 4


def without_weights(checkpoint: Path | None = None, prompts: Path | None = None) -> dict[str, Any]:
    """`tiny`: per model the table's kind, its worst and mean error over all t, bytes and bytes of the weights, and per
    sampler the relative L2 of the latents against the weights. `demo`: W8A8 files of the demo checkpoint with weights
    and with a table, by TFMQ Save and TFMQ Load. `projected`: sizes for real configurations, counted. `real_width`:
    errors of each kind for the embedder of Qwen-Image in its real width with random weights, which is as rough as a
    curve can be; trained weights are not at hand here."""
    return {
        "tiny": {name: _tiny(name) for name in TINY},
        "demo": demo(checkpoint, prompts),
        "projected": {name: projected(name) for name in REAL},
        "real_width": {"Qwen-Image": real_width("Qwen-Image")},
    }


def _tiny(name: str) -> dict[str, Any]:
    from bench.temporal.cache import patcher_of, sample

    load_pack()
    host, model = (import_module(f"{PACK_MODULE}.tfmq.host.{part}") for part in ("temporal.table", "model"))
    base, other = patcher_of(name), patcher_of(name)
    with torch.inference_mode():
        table = host.make(base, base, model.time_axis(base), lambda done, total: None)
    host.attach(other, table)
    found = {**_about(table.manifest()), "rel_l2": {}}
    for sampler in SAMPLERS:
        wanted = sample(base, name, sampler)
        found["rel_l2"][sampler] = float((sample(other, name, sampler) - wanted).norm() / wanted.norm())
    return found


def _about(manifest: dict[str, Any]) -> dict[str, Any]:
    keep = ("kind", "points", "rank", "worst_error", "mean_error", "bytes", "removed")
    return {key: manifest[key] for key in keep}


@torch.inference_mode()  # as in the host
def demo(checkpoint: Path | None, prompts: Path | None, pictures: int = PICTURES) -> dict[str, Any]:
    """Table, file sizes, and PSNR of the pictures from the file with a table against those from the file with weights;
    beside it that of either against float32."""
    pack = load_pack()
    from bench.quality.run import finite
    from bench.quality.sampling import DEMO, PROMPTS, Setting, calibrate, encode, load, read_prompts, sample, say
    from bench.temporal.error import adherence_of
    from tfmq.report import metrics

    swap, record, scheme, store, tables, files = (
        import_module(f"{pack.__name__}.tfmq.{part}")
        for part in ("host.quantize", "host.quantized", "scheme", "host.store", "host.temporal.table", "files")
    )
    path = checkpoint or demo_checkpoint.ensure()
    model, clip, vae = load(path)
    texts = read_prompts(prompts or PROMPTS)
    wanted, rest = texts[:pictures], texts[pictures:][-CALIBRATION:] or texts
    how: dict[str, Any] = dict(DEMO)
    setting = Setting(
        wanted, [encode(clip, t) for t in wanted], encode(clip, ""), how["steps"], how["cfg"], how["size"], vae
    )
    calibration = calibrate(pack, model, setting, [encode(clip, t) for t in rest])
    quantized = swap.quantize(model, calibration, scheme.PRESETS["W8A8"], lambda *_: None)
    reference = sample(model, setting)
    found: dict[str, Any] = {}
    made: dict[str, Tensor] = {}
    with _models_in_a_folder_of_their_own():
        for kind in (tables.WEIGHTS, tables.TABLE):
            file = store.save(quantized, f"bench/{kind}", kind)
            found[f"file_bytes_{kind}"] = file.stat().st_size
            loaded = store.load(str(file))
            found[f"network_bytes_{kind}"] = record.require_quantized(loaded).bytes_after
            made[kind] = sample(loaded, setting)
            found[f"psnr_db_{kind}_to_float32"] = finite(metrics.psnr(reference, made[kind]))
            found |= {f"{name}_{kind}": v for name, v in adherence_of(made[kind], wanted, checkpoint).items()}
            if kind == tables.TABLE:
                found |= _about(files.read_manifest(file, files.MODEL)[MANIFEST])
    found["psnr_db_table_to_weights"] = finite(metrics.psnr(made[tables.WEIGHTS], made[tables.TABLE]))
    say(f"temporal table: {found['psnr_db_table_to_weights']} dB to the weights")
    # The table alone, everything else in float32.
    other, _, _ = load(path, text=False)
    host_model = sys.modules[f"{pack.__name__}.tfmq.host.model"]
    tables.attach(other, tables.make(model, model, host_model.time_axis(model), lambda *_: None))
    found["psnr_db_alone"] = finite(metrics.psnr(reference, sample(other, setting)))
    return found


@contextmanager
def _models_in_a_folder_of_their_own() -> Iterator[None]:
    import folder_paths

    kind = "diffusion_models"
    known = folder_paths.folder_names_and_paths[kind]
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.folder_names_and_paths[kind] = ([folder], known[1])
        try:
            yield
        finally:
            folder_paths.folder_names_and_paths[kind] = known


def projected(name: str) -> dict[str, Any]:
    """Bytes of a file of a real configuration, counted: `bytes_16_bit` all of it in 16 bits, `bytes_8_bit` all but the
    temporal layers in 8; `temporal_bytes` of those, which a table replaces; `table_bytes` of each kind of table."""
    network, graph = _shell(name)
    inner = inner_layers(graph, find_tib(network).architecture)
    values = sum(_shape(network, path)[0] for path in graph.layers if path not in inner)
    layers = [network.get_submodule(path) for path in graph.layers]
    temporal = sum(p.numel() for layer in layers for p in layer.parameters())
    total = sum(p.numel() for p in network.parameters())
    sizes = {f"{GRID} {g}": (2 * values + 4) * g for g in KNOTS}
    sizes |= {f"{LOW_RANK} {r}": 2 * values * r + 4 * POINTS * (r + 1) for r in RANKS}
    sizes[f"{ROWS} {POINTS}"] = (2 * values + 4) * POINTS
    return {
        "parameters": total,
        "temporal_parameters": temporal,
        "temporal_bytes": 2 * temporal,
        "bytes_16_bit": 2 * total,
        "bytes_8_bit": 2 * temporal + total - temporal,
        "table_bytes": sizes,
    }


def real_width(name: str, seed: int = 0) -> dict[str, Any]:
    """Kind -> worst and mean error of one projection behind the embedder, in real width, all weights random."""
    network, graph = _shell(name)
    noise = torch.Generator().manual_seed(seed)
    last = min(graph.outputs, key=lambda path: _shape(network, path)[0])
    layers = {}
    for path in (*graph.embedder, last):
        shape = _shape(network, path)
        weight = torch.randn(shape, generator=noise) * shape[1] ** -0.5
        bias = 0.02 * torch.randn(shape[0], generator=noise)
        layers[path] = TemporalLayer(weight, bias, graph.layers[path].source, graph.layers[path].silu)
    channels = layers[graph.embedder[0]].weight.shape[1]
    small = TemporalGraph(layers, lambda t: sinusoid(1000 * t, channels))
    curve = fit({last: lambda t: small.features(t)[last]}, TimeAxis(0.0, 1.0), discrete=False)
    return {
        f"{trial['kind']} {trial['number']}": {key: trial[key] for key in ("worst_error", "mean_error")}
        for trial in curve.trials
    }


def _shell(name: str) -> tuple[nn.Module, TemporalGraph]:
    architecture, config = MODELS[name]
    network = build(architecture, **config)
    none = torch.zeros(1, 1)
    names = [f"{path}.{part}" for path in find_tib(network).layers for part in ("weight", "bias")]
    return network, temporal_graph(network, embed=lambda t: t, weights=dict.fromkeys(names, none))


def _shape(network: nn.Module, path: str) -> tuple[int, int]:
    weight = network.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]
