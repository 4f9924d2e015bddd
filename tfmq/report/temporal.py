"""Pictures of the temporal path: error curves over the timestep, activation ranges over time. matplotlib draws."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

INCH, DPI = 3.4, 110
FLOOR = 1e-7  # what a logarithmic axis shows for an error of zero


def missing() -> str | None:
    """Why nothing can be drawn here, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "the matplotlib package is not installed"
    return None


def curves(
    errors: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], positions: Sequence[float], unit: str = "t"
) -> Tensor:
    """One row per measure, one column per method, one line per layer.

    errors: measure -> method -> layer -> values per interval; positions: timestep at the centre of each interval.
    Returns a picture, float32 [H, W, 3] in 0..1.
    """
    from matplotlib.figure import Figure

    measures, methods = list(errors), list(next(iter(errors.values())))
    size = (INCH * len(methods), 0.75 * INCH * len(measures) + 0.5)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(measures), len(methods), squeeze=False, sharex=True, sharey="row")
    for row, measure in enumerate(measures):
        for column, method in enumerate(methods):
            axis = axes[row][column]
            layers = errors[measure][method]
            colours = _colours(len(layers))
            for colour, (_, values) in zip(colours, layers.items(), strict=True):
                shown = np.maximum(values, FLOOR) if measure.startswith("relative") else np.asarray(values)
                axis.plot(positions, shown, color=colour, linewidth=1.1, alpha=0.85)
            if measure.startswith("relative"):
                axis.set_yscale("log")
            axis.grid(alpha=0.25)
            if row == 0:
                axis.set_title(method, fontsize=10)
            if row == len(measures) - 1:
                axis.set_xlabel(unit, fontsize=9)
            if column == 0:
                axis.set_ylabel(measure, fontsize=9)
            axis.tick_params(labelsize=8)
    figure.suptitle("Temporal features: error over the timestep, one line per layer (dark first, bright last)")
    return _picture(figure)


def heat_map(ranges: Mapping[str, Sequence[float]], positions: Sequence[float], unit: str = "t") -> Tensor:
    """Width of each layer's activation range per interval, over its own greatest: layer -> values per interval.

    Intervals that no call visited are NaN and stay grey. Returns a picture, float32 [H, W, 3] in 0..1.
    """
    from matplotlib.figure import Figure

    values = np.array([list(row) for row in ranges.values()], dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = values / np.nanmax(values, axis=1, keepdims=True)
    named = len(ranges) <= 80
    figure = Figure(
        figsize=(11 if named else 8, max(3.0, min(0.16 * len(ranges), 30.0)) + 1), dpi=DPI, layout="constrained"
    )
    axis = figure.subplots()
    axis.set_facecolor("0.85")
    span = (positions[0], positions[-1], len(ranges) - 0.5, -0.5)
    image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", extent=span, vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="range over the layer's greatest")
    axis.set_xlabel(unit)
    if named:
        axis.set_yticks(range(len(ranges)), list(ranges), fontsize=6)
    else:
        axis.set_ylabel("layers in order of execution")
    axis.set_title("Activation ranges over time")
    return _picture(figure)


def _colours(count: int) -> list[tuple[float, ...]]:
    from matplotlib import colormaps

    return [tuple(colormaps["viridis"](i / max(count - 1, 1) * 0.9)) for i in range(count)]


def _picture(figure: Any) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)  # no window system, no global state
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32) / 255
    return torch.from_numpy(np.ascontiguousarray(pixels))
