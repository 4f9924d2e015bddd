"""How far quantized temporal features stray from the float ones over all timesteps, and what that does to a picture.

The temporal path is quantized and everything else left in float, so the pictures show nothing but its error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demo import checkpoint as demo_checkpoint
from devkit import inprocess
from tfmq.temporal.curve import fit as fit_curve
from tfmq.temporal.features import TemporalGraph, temporal_graph
from tfmq.temporal.fsc import FiniteSet, QuantizedTib, nearest_tib
from tfmq.temporal.selection import CACHE8, CACHE16, Selection, feature_errors, int8_rows, select
from tfmq.temporal.tiar import tiar
from tfmq.timeline import TimeAxis

AXIS = TimeAxis(0.0, 999.0)
PICTURES = 6
INTERVALS = 25
INT8, INT4 = "int8 TIAR+FSC", "int4 TIAR+FSC"


@torch.inference_mode()  # as in the host
def error(checkpoint: Path | None = None, prompts: Path | None = None, pictures: int = PICTURES) -> dict[str, Any]:
    """Entry name -> `rel_l2` (over all outputs and timesteps), `worst_cosine`, `worst_mismatch` (in timesteps),
    `bytes`, per-layer `layers` (rel_l2), and `psnr_db` against float32 over `pictures` prompts with the same seeds,
    with the `adherence` of those pictures and that of float32.

    All 1000 timesteps. `selected` may use the bytes of `tiar_fsc_int8`; `selected_int4_bytes` those of `tiar_fsc_int4`.
    """
    inprocess.use_host()
    from bench.quality.run import finite
    from bench.quality.sampling import DEMO, PROMPTS, Setting, encode, load, read_prompts, sample, say
    from tfmq.report import metrics

    model, clip, vae = load(checkpoint or demo_checkpoint.ensure())
    network = model.model.diffusion_model
    graph, times = temporal_graph(network), FiniteSet.of(AXIS)
    floats = graph.features(times.points)
    found, seconds = quantized(graph, times, say)
    chosen = {
        "selected": select(graph, times, {INT8: found["tiar_fsc_int8"], INT4: found["tiar_fsc_int4"]}, reference=INT8),
        "selected_int4_bytes": select(
            graph, times, {INT8: found["tiar_fsc_int8"], INT4: found["tiar_fsc_int4"]}, reference=INT4
        ),
    }
    features = {name: outputs_of(tib.features(times.points), graph) for name, tib in found.items()}
    features["cache"] = {p: floats[p].half().float() for p in graph.outputs}
    tibs = {INT8: found["tiar_fsc_int8"], INT4: found["tiar_fsc_int4"]}
    for name, selection in chosen.items():
        features[name] = selected_features(selection, graph, times, tibs)
    sizes = {name: tib.nbytes for name, tib in found.items()}
    sizes |= {name: selection.bytes for name, selection in chosen.items()}
    sizes["cache"] = 2 * sum(floats[p].numel() for p in graph.outputs)
    result: dict[str, Any] = {
        name: {**figures(graph, times, floats, some), "bytes": sizes[name]} for name, some in features.items()
    }
    for name, taken in seconds.items():
        result[name]["seconds"] = round(taken, 1)
    result["cache"] |= {"dtype": "float16", "int8": _other_cache(chosen["selected"])}
    for name, selection in chosen.items():
        result[name] |= {"budget": selection.budget, "embedder": selection.embedder, "choices": _choices(selection)}
    if pictures:
        texts = read_prompts(prompts or PROMPTS)[:pictures]
        encoded = [encode(clip, text) for text in texts]
        how: dict[str, Any] = dict(DEMO)
        setting = Setting(texts, encoded, encode(clip, ""), how["steps"], how["cfg"], how["size"], vae)
        reference = sample(model, setting)
        for name, some in features.items():
            with replaced(network, some):
                found_pictures = sample(model, setting)
            result[name]["psnr_db"] = finite(metrics.psnr(reference, found_pictures))
            result[name] |= adherence_of(found_pictures, texts, checkpoint)
            say(f"{name}: {result[name]['psnr_db']} dB")
        for entry in result.values():
            entry["pictures"] = len(texts)
            entry |= {f"{name}_of_float32": v for name, v in adherence_of(reference, texts, checkpoint).items()}
    curve = fit_curve(layer_functions(graph), AXIS, discrete=True)
    result["cache"]["without_weights"] = curve.manifest() | {"measured": curve.trials}
    return result


def adherence_of(pictures: Tensor, texts: list[str], checkpoint: Path | None) -> dict[str, float]:
    """`adherence`: how well the demo checkpoint's pictures [N, H, W, 3] show what was asked for, 0..1; nothing for
    pictures of another checkpoint."""
    from demo import adherence, render

    if checkpoint is not None and checkpoint.resolve() != demo_checkpoint.TARGET.resolve():
        return {}
    score = adherence.mean_score([picture.numpy() for picture in pictures], [render.parse(text) for text in texts])
    return {"adherence": round(score, 6)}


def quantized(graph: TemporalGraph, times: FiniteSet, say: Any) -> tuple[dict[str, QuantizedTib], dict[str, float]]:
    """The four quantized TIBs, and the seconds that each took."""
    found: dict[str, QuantizedTib] = {}
    seconds: dict[str, float] = {}
    for bits in (8, 4):
        for name, make in (
            (f"nearest_int{bits}", lambda bits=bits: nearest_tib(graph, times, bits)),
            (f"tiar_fsc_int{bits}", lambda bits=bits: tiar(graph, times, bits).tib),
        ):
            started = time.perf_counter()
            found[name] = make()
            seconds[name] = time.perf_counter() - started
            say(f"{name} in {seconds[name]:.1f} s")
    return found, seconds


def figures(
    graph: TemporalGraph, times: FiniteSet, floats: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> dict[str, Any]:
    interval = torch.arange(times.points.numel()) * INTERVALS // times.points.numel()
    errors = {p: feature_errors(floats[p], found[p], times, interval, INTERVALS) for p in graph.outputs}
    squared = sum(sum(e.squared) for e in errors.values())
    return {
        "rel_l2": (squared / sum(sum(e.energy) for e in errors.values())) ** 0.5,
        "worst_cosine": min(e.worst_cosine for e in errors.values()),
        "worst_mismatch": max(e.worst_mismatch for e in errors.values()),
        "layers": {p: e.total_rel_l2 for p, e in errors.items()},
    }


def layer_functions(graph: TemporalGraph) -> dict[str, Callable[[Tensor], Tensor]]:
    """Output path -> its feature as a function of t, one layer at a time to need the memory of one alone."""
    before = {path: graph.layers[path] for path in graph.embedder}

    def function(path: str) -> Callable[[Tensor], Tensor]:
        small = TemporalGraph({**before, path: graph.layers[path]}, graph.embed)
        return lambda t: small.features(t)[path]

    return {path: function(path) for path in graph.outputs}


def selected_features(
    selection: Selection, graph: TemporalGraph, times: FiniteSet, tibs: Mapping[str, QuantizedTib]
) -> dict[str, Tensor]:
    """What a selection gives at all timesteps of the finite set: output path -> float32 [T, N]."""
    count = times.points.numel()
    intervals = len(next(iter(next(iter(selection.candidates.values())).values())).rel_l2)
    interval = torch.arange(count, device=times.points.device) * intervals // count
    floats = graph.features(times.points)
    family = tibs[selection.embedder].features(times.points) if selection.embedder in tibs else floats
    out = {}
    for path, choice in selection.choices.items():
        caches = {CACHE8: lambda f: int8_rows(f)[0], CACHE16: lambda f: f.half().float()}
        value = caches[choice.base](floats[path]) if choice.base in caches else family[path]
        if choice.cached:
            where = torch.isin(interval, torch.tensor(choice.cached, device=interval.device)).unsqueeze(1)
            value = torch.where(where, caches[choice.rows](floats[path]), value)
        out[path] = value
    return out


def outputs_of(features: Mapping[str, Tensor], graph: TemporalGraph) -> dict[str, Tensor]:
    return {path: features[path] for path in graph.outputs}


@contextmanager
def replaced(network: nn.Module, features: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the temporal layers of a UNet give row t of `features` [1000, N] whatever they compute."""
    now = {"t": torch.zeros(1, dtype=torch.int64)}

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t = args[1] if len(args) > 1 else kwargs["timesteps"]
        now["t"] = t.round().long()

    handles = [network.register_forward_pre_hook(begin, with_kwargs=True)]
    for path, rows in features.items():
        handles.append(
            network.get_submodule(path).register_forward_hook(
                lambda module, args, out, rows=rows: rows[now["t"].cpu()].to(out)
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _choices(selection: Selection) -> dict[str, Any]:
    return {
        path: {"base": c.base, "cached_intervals": len(c.cached), "rel_l2": c.rel_l2, "bytes": c.bytes, "why": c.why}
        for path, c in selection.choices.items()
    }


def _other_cache(selection: Selection) -> dict[str, float]:
    errors = selection.candidates[CACHE8]
    squared = sum(sum(e.squared) for e in errors.values())
    return {
        "rel_l2": (squared / sum(sum(e.energy) for e in errors.values())) ** 0.5,
        "worst_cosine": min(e.worst_cosine for e in errors.values()),
        "bytes": sum(size for path, size in selection.candidate_bytes[CACHE8].items() if path in errors),
        "bytes_float16": sum(size for path, size in selection.candidate_bytes[CACHE16].items() if path in errors),
    }
