"""A plan that a person has changed: the JSON of a report with other bits here and there, accepted back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ..errors import TfmqError
from ..formats.hadamard import group_of
from ..kernels.costs import FREE, Costs
from ..observe.calibration import Calibration
from ..observe.statistics import LayerStatistics
from ..scheme import DYNAMIC, INT, NONE, STATIC, Plan, Scheme
from .candidates import scheme_of

FLOAT = 16
BITS = (4, 8, FLOAT)


def edited(
    plan: Plan,
    text: str,
    calibration: Calibration,
    keep: Mapping[str, str],
    costs: Costs = FREE,
) -> Plan:
    """`plan` with the layers that `text` names as it says; the others stay as they were decided.

    text: JSON with an object `layers` (the report of TFMQ Quantize has one under `plan`): path -> 4, 8 or 16 bits per
    weight, or an object with the fields of a `Scheme`, of which those that are missing are decided. 16 leaves a layer
    in float. keep: path -> why it must stay in float.
    Raises TfmqError for text that is no such JSON, a layer that is not there, or a scheme that cannot be.
    """
    layers, reasons, left = dict(plan.layers), dict(plan.reasons), dict(plan.left)
    for path, wanted in _wanted(text).items():
        if path not in layers and path not in left:
            raise TfmqError(f"The plan names the layer {path}, which this model does not have: take its line out.")
        given = wanted if isinstance(wanted, dict) else {"weight_bits": wanted}
        bits = given.get("weight_bits", layers[path].weight_bits if path in layers else FLOAT)
        if isinstance(bits, bool) or bits not in BITS:
            raise TfmqError(f"The plan wants {bits!r} bits for layer {path}: there are 4, 8 and 16 (float).")
        if bits == FLOAT:
            layers.pop(path, None)
            reasons.pop(path, None)
            left.setdefault(path, "asked for in the plan")
            continue
        statistics = calibration.layers.get(path)
        if path in keep or statistics is None or statistics.vector:
            why = keep.get(path) or left.get(path, "the calibration never saw it run")
            raise TfmqError(f"The plan wants {bits} bits for layer {path}, which stays in float ({why}): take it out.")
        recipe = plan.recipe
        if given.get("activation") == NONE:
            recipe = replace(recipe, activation_bits=16)
        elif recipe.activation_bits == 16 and given.get("activation") in (STATIC, DYNAMIC):
            recipe = replace(recipe, activation_bits=8)
        if isinstance(given.get("group"), int) and given["group"] > 0:
            recipe = replace(recipe, group=given["group"])
        decided, reason = scheme_of(recipe, statistics, int(bits), costs)
        scheme = _scheme(path, decided, given)
        _require_possible(path, scheme, statistics)
        if scheme != layers.get(path):
            reason = f"asked for in the plan; {reason}"
        layers[path], reasons[path] = scheme, reasons.get(path, reason) if scheme == layers.get(path) else reason
        left.pop(path, None)
    if not layers:
        raise TfmqError("The plan leaves every layer in float: give at least one layer 4 or 8 bits.")
    return replace(plan, layers=layers, reasons=reasons, left=left)


def _wanted(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
        data = data.get("plan", data)
        wanted = data["layers"]
        if not isinstance(wanted, dict):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise TfmqError(
            'The plan is no JSON with an object "layers" in it: give the report of TFMQ Quantize with some bits '
            'changed, or {"layers": {"path.of.a.layer": 8}}.'
        ) from None
    return wanted


def _scheme(path: str, decided: Scheme, given: Mapping[str, Any]) -> Scheme:
    unknown = given.keys() - asdict(decided).keys()
    if unknown:
        raise TfmqError(f"The plan gives layer {path} a field {min(unknown)!r}, which no scheme has: take it out.")
    scheme = replace(decided, **given)
    if not scheme.grouped:
        return replace(scheme, group=0)  # left over from another number of bits
    return replace(scheme, group=decided.group) if scheme.group == 0 else scheme


def _require_possible(path: str, scheme: Scheme, statistics: LayerStatistics) -> None:
    """Raises TfmqError for a scheme that cannot be, or not of this layer."""
    conv, channels = statistics.kind == "conv2d", statistics.shape[1]
    problem = scheme.problem()
    if problem is not None:
        pass
    elif conv and scheme.activation == DYNAMIC:
        problem = "activations per token, which a convolution has not"
    elif conv and scheme.weight_format != INT:
        problem = f"the format {scheme.weight_format}, which is for Linear layers"
    elif scheme.weight_bits == 4 and scheme.weight_format == INT and channels % scheme.group:
        problem = f"4 bits in groups of {scheme.group}, which do not divide its {channels} input channels"
    elif scheme.balanced and statistics.balance is None:
        problem = "a balance, which the calibration did not find worth it"
    elif scheme.branches > 1 and statistics.branches is None:
        problem = "ranges for two branches, which the calibration did not find worth it"
    elif scheme.rotation and (conv or statistics.rotated is None or scheme.rotation != group_of(channels)):
        problem = f"a rotation in blocks of {scheme.rotation}, which the calibration did not look at"
    elif scheme.permuted and statistics.permutations is None:
        problem = "permutations, which the calibration did not find worth it"
    if problem is not None:
        raise TfmqError(f"The plan gives layer {path} {problem}: change that.")
