"""The temporal path of a MODEL in integers or as rows of a cache: what TFMQ Quantize does with its `temporal` input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...temporal.features import TemporalGraph
from ...temporal.fsc import FiniteSet, QuantizedLayer, QuantizedTib
from ...temporal.packing import pack, signed_zero_point
from ...temporal.selection import CACHE8, CACHE16, NONE, Selection, int8_table, select
from ...temporal.tiar import tiar
from ...timeline import TimeAxis
from ...words import Choice
from ..network import Network
from .graph import graph_of
from .leaf import TemporalState, temporal_state

FLOAT, INT8, INT4, SELECTED = "float", "int8 (TIAR + FSC)", "int4 (TIAR + FSC)", "selected"
# The value: bits of all layers.
MODES = {
    FLOAT: Choice("left as they are"),
    INT8: Choice("8 bits, with rounding fitted to all timesteps", 8),
    INT4: Choice("4 bits, with rounding fitted to all timesteps", 4),
    SELECTED: Choice("per layer the least error of these, caches and float weights, in at most the bytes of int8"),
}
INTERVALS = 25  # parts of the time axis of which a selection may cache some and not others

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Temporal:
    """states: layer path -> what takes its place; a layer that is not there stays in float. reasons: path -> one line,
    for all layers of the temporal path. deaf: parameters whose patches can have no effect any more, or not all of it.
    points: of the finite set."""

    states: dict[str, TemporalState]
    reasons: dict[str, str]
    deaf: tuple[str, ...]
    points: int


def steps(network: Network, mode: str) -> int:
    """How many steps of progress `solve` tells."""
    layers = len(network.tib.layers)
    return {FLOAT: 0, SELECTED: 2 * layers}.get(mode, layers)


def solve(network: Network, mode: str, axis: TimeAxis, progress: Progress) -> Temporal:
    """Quantize the temporal path over all timesteps, patches merged; with `FLOAT` nothing. progress: called with (done,
    total).

    Raises TfmqError for a MODEL whose temporal features do not depend on t alone or whose embedding is not known.
    """
    if mode == FLOAT:
        return Temporal({}, {}, (), 0)
    device = with_float64(network.patcher.load_device)
    graph = graph_of(network, device)
    times = FiniteSet(FiniteSet.of(axis).points.to(device))
    wanted = (INT8, INT4) if mode == SELECTED else (mode,)
    total, tibs = steps(network, mode), {}
    for number, name in enumerate(wanted):

        def tell(done: int, _: int, number: int = number) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress(done + number * len(graph.layers), total)

        tibs[name] = tiar(graph, times, MODES[name].value, progress=tell).tib
    with torch.inference_mode(False), torch.no_grad():
        times = FiniteSet(times.points.clone())
        if mode == SELECTED:
            size = network.layers[graph.outputs[0]].weight.element_size()
            chosen = select(graph, times, tibs, reference=INT8, intervals=INTERVALS, float_bytes=size)
            found = _selected(graph, times, tibs, chosen)
        else:
            found = _one_width(graph, times, tibs[mode], mode)
    return replace(found, states={p: _to(state, network.patcher.offload_device) for p, state in found.states.items()})


def _one_width(graph: TemporalGraph, times: FiniteSet, tib: QuantizedTib, mode: str) -> Temporal:
    floats, found = graph.features(times.points), tib.features(times.points)
    count = times.points.numel()
    states, reasons = {}, {}
    for path, layer in tib.layers.items():
        states[path] = _weights(layer, count)
        error = float((found[path] - floats[path]).double().norm() / floats[path].double().norm())
        reasons[path] = f"{mode}: error {error:.1e} over all timesteps in {layer.nbytes} bytes"
    return Temporal(states, reasons, (), count)


def _selected(graph: TemporalGraph, times: FiniteSet, tibs: dict[str, QuantizedTib], chosen: Selection) -> Temporal:
    floats = graph.features(times.points)
    count = times.points.numel()
    shapes = {path: _shape(layer.weight) for path, layer in graph.layers.items()}
    states: dict[str, TemporalState] = {}
    reasons: dict[str, str] = {}
    for path in graph.embedder:
        if chosen.embedder in tibs:
            states[path] = _weights(tibs[chosen.embedder].layers[path], count)
        elif chosen.embedder == NONE:
            states[path] = temporal_state(shapes[path], count)
        reasons[path] = (
            "not kept: all features come from a cache" if chosen.embedder == NONE else f"embedder: {chosen.embedder}"
        )
    deaf: list[str] = []
    cached = False
    for path, choice in chosen.choices.items():
        base = choice.rows if len(choice.cached) == INTERVALS else choice.base
        if base in (CACHE8, CACHE16):
            states[path] = replace(temporal_state(shapes[path], count), **_rows(floats[path], base))
            deaf += [f"{path}.bias"] + ([f"{path}.weight"] if chosen.embedder == NONE else [])
            cached = True
        elif base in tibs:
            rows = _rows(floats[path], choice.rows, choice.cached) if choice.cached else {}
            states[path] = replace(_weights(tibs[base].layers[path], count), **rows)
            cached = cached or bool(choice.cached)
        reasons[path] = f"{base}: {choice.why}"
    if cached:
        deaf += [f"{path}.{name}" for path in graph.embedder for name in ("weight", "bias")]
    return Temporal(states, reasons, tuple(deaf), count)


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _weights(layer: QuantizedLayer, points: int) -> TemporalState:
    return temporal_state(
        _shape(layer.codes), points, layer.bits, codes=pack(layer.codes, layer.bits), scale=layer.scale,
        zero_point=signed_zero_point(layer.zero_point, layer.bits), act_scale=layer.act_scale,
        act_zero_point=layer.act_zero_point,
    )  # fmt: skip


def _rows(features: Tensor, kind: str, intervals: Iterable[int] | None = None) -> dict[str, Any]:
    """The tensors of a cache of features [T, N], of all timesteps or of those of some intervals."""
    table: dict[str, Tensor] = {}
    if kind == CACHE16:
        table["rows"] = features.half()
    else:
        table["rows"], table["row_scale"], table["row_low"] = int8_table(features)
    if intervals is None:
        return table
    count, chosen = features.shape[0], set(intervals)
    where = torch.arange(count) * INTERVALS // count
    kept = torch.isin(where, torch.tensor(sorted(chosen))).to(features.device)
    sizes = torch.bincount(where, minlength=INTERVALS).tolist()
    start, starts = 0, []
    for interval, size in enumerate(sizes):
        starts.append(start if interval in chosen else -1)
        start += size if interval in chosen else 0
    per_row = {name: v[kept] if v.shape[0] == count else v for name, v in table.items()}
    return per_row | {"row_start": torch.tensor(starts, dtype=torch.int32)}


def with_float64(device: torch.device) -> torch.device:
    """This device, or the CPU in place of one that may not have float64 (Apple's, some of Intel's)."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def _to(state: TemporalState, device: Any) -> TemporalState:
    tensors: dict[str, Any] = {name: v.to(device) for name, v in vars(state).items() if isinstance(v, Tensor)}
    return replace(state, **tensors)
