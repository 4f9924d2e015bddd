"""Recipe + calibration -> plan: which layer is represented how, and why.

The rule for the activations of a Linear layer (`activations="auto"`). Both errors come from the calibration, on the
same balanced input, energy-weighted over the intervals: of a static affine grid per interval (range method of the
recipe) and of per-token affine quantization. Static is chosen if

    error(static) <= error(dynamic) * cost(dynamic),

errors as relative L2, cost = time of a dynamic layer over a static one as the backend of this machine declares it.
A convolution is always static: its inputs overlap, so that no scale per token exists.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .calibration import Calibration
from .errors import TfmqError
from .observe import LayerStatistics
from .quantizer import affine_grid, histogram_error, search_range
from .scheme import DYNAMIC, STATIC, Plan, Recipe, Scheme


def decide(
    recipe: Recipe,
    calibration: Calibration,
    layers: Mapping[str, str],
    keep: Mapping[str, str],
    dynamic_cost: float = 1.0,
) -> Plan:
    """Choose a scheme for every layer.

    layers: path -> "linear" or "conv2d", all candidates in the model. keep: path -> why it must stay in float.
    dynamic_cost: time of a dynamic layer over a static one on the backend in use.
    Raises TfmqError if no layer at all can be quantized.
    """
    chosen: dict[str, Scheme] = {}
    reasons: dict[str, str] = {}
    left: dict[str, str] = {}
    for path, kind in layers.items():
        statistics = calibration.layers.get(path)
        if path in keep:
            left[path] = keep[path]
        elif kind == "conv2d" and not recipe.convolutions:
            left[path] = f"recipe {recipe.name} leaves convolutions in float"
        elif statistics is None:
            left[path] = "the calibration never saw it run"
        elif statistics.vector:
            left[path] = "one row per image: integers would save no time and cost precision everywhere"
        else:
            activation, reasons[path] = _activation(recipe, statistics, dynamic_cost)
            chosen[path] = Scheme(
                recipe.weight_bits, recipe.activation_bits, activation, statistics.balance is not None
            )
    if not chosen:
        raise TfmqError(
            f"Recipe {recipe.name} finds no layer to quantize in this model: the calibration saw "
            f"{len(calibration.layers)} layers and all of them must stay in float."
        )
    return Plan(recipe, chosen, reasons, left)


def static_grid(statistics: LayerStatistics, method: str, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Scale [I] float32 and zero point [I] int32 of every interval, unvisited ones filled from their neighbours."""
    low, high = search_range(statistics.histogram, statistics.bin_low, statistics.bin_high, method, bits)
    # The histogram's bins are wider than the data; never reach beyond what was seen.
    low, high = torch.maximum(low, statistics.low.clamp_max(0)), torch.minimum(high, statistics.high.clamp_min(0))
    visited = statistics.histogram.sum(1) > 0
    return affine_grid(_fill(low, visited), _fill(high, visited), bits)


def static_error(statistics: LayerStatistics, method: str, bits: int = 8) -> float:
    """Relative L2 error of the static grids on the calibration data, over all intervals."""
    scale, zero_point = static_grid(statistics, method, bits)
    sums = histogram_error(statistics.histogram, statistics.bin_low, statistics.bin_high, scale, zero_point, bits).sum(
        0
    )
    return float((sums[0] / sums[1].clamp_min(1e-30)).sqrt())


def dynamic_error(statistics: LayerStatistics) -> float:
    """Relative L2 error of per-token quantization on the calibration data, over all intervals."""
    sums = statistics.row_error.sum(0)
    return float((sums[0] / sums[1].clamp_min(1e-30)).sqrt())


def _activation(recipe: Recipe, statistics: LayerStatistics, dynamic_cost: float) -> tuple[str, str]:
    if statistics.kind == "conv2d":
        return STATIC, "convolution"
    if recipe.activations in (STATIC, DYNAMIC):
        return recipe.activations, "asked for"
    static, dynamic = static_error(statistics, recipe.ranges, recipe.activation_bits), dynamic_error(statistics)
    choice = STATIC if static <= dynamic * dynamic_cost else DYNAMIC
    return choice, f"error static {static:.2e}, per token {dynamic:.2e}, cost of per token x{dynamic_cost:.2f}"


def _fill(values: Tensor, visited: Tensor) -> Tensor:
    """Linear interpolation over the unvisited intervals, constant beyond the ends."""
    if not bool(visited.any()):
        return values
    known = visited.nonzero().flatten()
    out = values.clone()
    for i in (~visited).nonzero().flatten().tolist():
        below, above = known[known < i], known[known > i]
        if below.numel() and above.numel():
            a, b = int(below[-1]), int(above[0])
            out[i] = torch.lerp(values[a], values[b], (i - a) / (b - a))
        else:
            out[i] = values[int(below[-1]) if below.numel() else int(above[0])]
    return out
