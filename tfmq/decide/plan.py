"""Recipe + calibration -> plan: which layer is represented how, and why."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import TfmqError
from ..kernels.costs import FREE, Costs
from ..observe.calibration import Calibration
from ..scheme import Plan, Recipe, Scheme
from .candidates import scheme_of


def decide(
    recipe: Recipe,
    calibration: Calibration,
    layers: Mapping[str, str],
    keep: Mapping[str, str],
    costs: Costs = FREE,
) -> Plan:
    """Choose a scheme for every layer.

    layers: path -> "linear" or "conv2d", all candidates in the model. keep: path -> why it must stay in float.
    costs: of the backend in use.
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
            chosen[path], reasons[path] = scheme_of(recipe, statistics, recipe.weight_bits, costs)
    if not chosen:
        raise TfmqError(
            f"Recipe {recipe.name} finds no layer to quantize in this model: the calibration saw "
            f"{len(calibration.layers)} layers and all of them must stay in float. Choose another recipe."
        )
    return Plan(recipe, chosen, reasons, left)
