"""What the temporal path of a MODEL would lose, method by method, and what would be chosen: TFMQ Temporal Report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...observe.calibration import Calibration
from ...temporal.fsc import FiniteSet, QuantizedTib, nearest_tib
from ...temporal.selection import Choice, Selection, feature_errors, select
from ...temporal.tiar import tiar
from ...words import counted
from ..model import time_axis
from ..network import Network
from .graph import graph_of

REFERENCE = "int8 TIAR+FSC"
MEASURES = {"relative L2 error": "rel_l2", "cosine": "cosine", "mismatch (timesteps)": "mismatch"}


@dataclass(frozen=True)
class TemporalReport:
    """selection: errors of all candidates and the choice. nearest: method -> layer -> measure -> values per interval,
    for the plain roundings that selection does not consider. centers: timesteps at the middle of the intervals."""

    selection: Selection
    nearest: dict[str, dict[str, dict[str, list[float]]]]
    centers: list[float]

    def curves(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """measure -> method -> layer -> values per interval."""
        out: dict[str, dict[str, dict[str, list[float]]]] = {}
        for measure, name in MEASURES.items():
            methods = {m: {p: v[name] for p, v in layers.items()} for m, layers in self.nearest.items()}
            for method, found in self.selection.candidates.items():
                if method != "float weights":  # zero by definition
                    methods[method] = {path: getattr(errors, name) for path, errors in found.items()}
            out[measure] = methods
        return out


def examine(
    patcher: ModelPatcher, intervals: int, steps: int, budget: int | None, progress: Callable[[int, int], None]
) -> TemporalReport:
    """Quantize the TIB of a float MODEL in every way there is and measure each over its whole finite set.

    steps: of TIAR's joint stage. budget: bytes for the selection, by default those of the int8 variant. progress:
    called with (done, total). Raises TfmqError for a MODEL without a TIB, or one that depends on more than t.
    """
    graph = graph_of(Network.of(patcher), torch.device("cpu"))
    times = FiniteSet.of(time_axis(patcher))
    tibs: dict[str, QuantizedTib] = {}
    stages = len(graph.layers) + steps
    before = 0

    def tell(done: int, _: int) -> None:
        progress(before + done, 2 * stages)

    for bits in (8, 4):
        tibs[f"int{bits} TIAR+FSC"] = tiar(graph, times, bits, steps=steps, progress=tell).tib
        before += stages
    selection = select(graph, times, tibs, reference=REFERENCE, budget=budget, intervals=intervals)
    floats = graph.features(times.points)
    count = times.points.numel()
    interval = torch.arange(count) * intervals // count
    nearest = {}
    for bits in (8, 4):
        found = nearest_tib(graph, times, bits).features(times.points)
        errors = {p: feature_errors(floats[p], found[p], times, interval, intervals) for p in graph.outputs}
        nearest[f"int{bits} nearest"] = {path: asdict(e) for path, e in errors.items()}
    centers = [float(times.points[interval == i].mean()) for i in range(intervals)]
    return TemporalReport(selection, nearest, centers)


def activation_ranges(calibration: Calibration) -> dict[str, list[float]]:
    """Layer -> width of the range of its (balanced) input per interval, NaN where no call came."""
    out = {}
    for path, statistics in calibration.layers.items():
        width = statistics.high - statistics.low
        width[~torch.isfinite(width)] = float("nan")
        out[path] = width.tolist()
    return out


def table(report: TemporalReport) -> str:
    """One line per layer: what was chosen, its error, its bytes and why."""
    s = report.selection
    lines = [
        f"{counted(len(s.choices), 'temporal layer')}, {s.bytes} of {s.budget} bytes, embedder kept as: {s.embedder}",
        *(
            f"{c.path}: {c.base}{_rows(c)}, rel. L2 "
            f"{c.rel_l2:.2e}, worst cosine {c.worst_cosine:.6f}, {c.bytes} bytes ({c.why})"
            for c in s.choices.values()
        ),
    ]
    return "\n".join(lines)


def _rows(choice: Choice) -> str:
    return f" + {choice.rows} for {counted(len(choice.cached), 'interval')}" if choice.cached else ""


def data(report: TemporalReport) -> dict[str, Any]:
    """The same for report.json and report.html."""
    s = report.selection
    return {
        "choices": {path: asdict(choice) for path, choice in s.choices.items()},
        "bytes": s.bytes,
        "budget_bytes": s.budget,
        "embedder": s.embedder,
        "candidate_bytes": s.candidate_bytes,
        "total_rel_l2": {m: {p: e.total_rel_l2 for p, e in found.items()} for m, found in s.candidates.items()},
        "timesteps": report.centers,
        "curves": report.curves(),
    }
