"""The last arrow in the graph: solved layers into a clone of the MODEL."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..decide.edit import edited
from ..decide.grids import Grid
from ..decide.plan import decide
from ..decide.tdq import over_time
from ..errors import TfmqError
from ..kernels.table import costs_of
from ..observe.calibration import Calibration
from ..rounding.efforts import NEAREST
from ..rounding.reconstruct import Result
from ..runtime.run_state import RunState
from ..scheme import INT, Plan, Recipe, Scheme
from ..solve.layer import solve_layer
from ..state import LayerState
from ..timeline import Clock, TimeAxis
from . import bits
from .leaf import nf4
from .leaf.leaf import make_leaf
from .model import PREFIX, fingerprint, sampling_kind
from .network import Network
from .quantized import Quantized, attach
from .rounding import run as reconstruct
from .temporal import quantize as temporal_quant
from .temporal.leaf import TemporalLinear, finite_set_clock

SECONDS_BETWEEN_LINES = 15.0  # of the log, while weights are rounded


def quantize(
    patcher: ModelPatcher, calibration: Calibration, recipe: Recipe, progress: Any, changes: str = ""
) -> ModelPatcher:
    """A clone of the MODEL whose layers compute in integers. progress: called with (done, total).

    changes: a plan as JSON (`tfmq.decide.edit`), or nothing.

    LoRA patches that are on the MODEL are merged before rounding. Raises TfmqError for a MODEL or calibration that
    does not fit.
    """
    network = Network.of(patcher)
    _require_same(patcher, calibration)
    plan = _planned(network, calibration, recipe, changes, progress)
    grids = over_time(plan, calibration)
    rounding = _rounded(network, calibration, plan, grids, progress)

    first = temporal_quant.steps(network, recipe.temporal)
    total = first + len(plan.layers)
    temporal = temporal_quant.solve(network, recipe.temporal, calibration.axis, lambda done, _: progress(done, total))
    left = {path: why for path, why in plan.left.items() if path not in temporal.reasons}
    plan = replace(plan, left=left, temporal=temporal.reasons)

    clone = patcher.clone()
    _move_biases(clone, plan, rounding)
    temporal_clock, saved = _put_temporal(clone, network, temporal, calibration.axis)
    clock = RunState(calibration.axis, calibration.partition)
    for done, (path, scheme) in enumerate(plan.layers.items(), first + 1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        state = _solved(network, calibration, recipe, path, scheme, grids, rounding)
        saved += _put(clone, network, path, state, clock, rounding.biases.get(path))
        progress(done, total)

    before = comfy.model_management.module_size(network.module)
    baked = {key: len(patches) for key, patches in clone.patches.items()}
    record = Quantized(
        plan, {path: network.kinds[path] for path in plan.layers}, calibration.model, calibration.sampling, clock,
        before, before - saved, baked, temporal_clock, temporal.deaf, rounding.note,
    )  # fmt: skip
    attach(clone, record, patcher.model_size() - saved)
    return clone


def _require_same(patcher: ModelPatcher, calibration: Calibration) -> None:
    kind = sampling_kind(patcher)
    if calibration.sampling != kind:
        raise TfmqError(
            f"The calibration was made with another kind of sampling ({calibration.sampling}, this MODEL has {kind}): "
            "calibrate this MODEL, with the same model sampling node before both."
        )
    if calibration.model != fingerprint(patcher):
        raise TfmqError(
            "The calibration belongs to another model, or to this one with other LoRAs: connect the same MODEL to TFMQ "
            "Calibrate and TFMQ Quantize."
        )


def _planned(network: Network, calibration: Calibration, recipe: Recipe, changes: str, progress: Any) -> Plan:
    device = network.patcher.load_device
    keep = _unknown_ends(network, calibration) | network.keep
    costs = costs_of(device, network.geometries.values())
    plan = decide(recipe, calibration, network.kinds, keep, costs)
    if recipe.mixed:
        plan = bits.mixed_plan(network, calibration, recipe, keep, costs, progress)
    if changes.strip():
        plan = edited(plan, changes, calibration, keep, costs)
    nf4.require_for(plan, device)
    return plan


def _unknown_ends(network: Network, calibration: Calibration) -> dict[str, str]:
    """First and last layer by the order of execution, for an architecture that no table knows."""
    if network.ends:
        return {}
    paths = list(calibration.layers)
    return {paths[0]: "first layer (by order of execution)", paths[-1]: "last layer (by order of execution)"}


def _rounded(
    network: Network, calibration: Calibration, plan: Plan, grids: Mapping[str, Grid], progress: Any
) -> Result:
    """Codes of the 4-bit layers by the recipe's way of rounding, and with them those of 8 bits; none for nearest."""
    fours = any(scheme.weight_bits == 4 and scheme.weight_format == INT for scheme in plan.layers.values())
    if plan.recipe.rounding == NEAREST or not fours:
        return Result({}, {}, 0, 0)
    told = time.monotonic()

    def tell(done: int, total: int, left: float) -> None:
        nonlocal told
        progress(done, total)
        if time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            logging.info("TFMQ: rounding weights, %d of %d, about %d s left", done, total, left)

    return reconstruct(network, calibration, plan, grids, plan.recipe.rounding, tell)


def _move_biases(clone: ModelPatcher, plan: Plan, rounding: Result) -> None:
    """Of layers that stay in float; like any weight patch these travel with the MODEL, and are merged where it is
    saved."""
    moved = {f"{PREFIX}{path}.bias": by for path, by in rounding.biases.items() if path not in plan.layers}
    clone.add_patches({key: ("diff", (by,)) for key, by in moved.items()})


def _solved(
    network: Network, calibration: Calibration, recipe: Recipe, path: str, scheme: Scheme,
    grids: Mapping[str, Grid], rounding: Result,
) -> LayerState:  # fmt: skip
    weight = network.weight(path)
    try:
        if scheme.weight_format != INT:
            return nf4.solve(scheme, weight)
        statistics, rounded = calibration.layers[path], rounding.layers.get(path)
        return solve_layer(scheme, statistics, weight, recipe.ranges, grids.get(path), rounded)
    except FloatingPointError as error:
        raise TfmqError(f"Layer {path} cannot be quantized: {error}; load an intact copy of the model.") from None


def _put(
    clone: ModelPatcher, network: Network, path: str, state: LayerState, clock: RunState, moved: Tensor | None
) -> int:
    """Hang a leaf into `clone` in place of a layer; returns the bytes that this saves. moved: to be added to the
    bias."""
    layer, bias = network.layers[path], network.bias(path)
    weight = layer.weight
    if bias is not None:
        bias = bias if moved is None else bias.float() + moved.to(bias.device)
        bias = bias.to(clone.offload_device, weight.dtype)
    state = state.to(clone.offload_device)
    _replace(clone, path, make_leaf(layer, state, network.geometries[path], clock, bias, weight.dtype))
    return weight.nbytes - state.nbytes


def _put_temporal(
    clone: ModelPatcher, network: Network, temporal: temporal_quant.Temporal, axis: TimeAxis
) -> tuple[Clock | None, int]:
    """As `_put`, for the temporal path; with the clock of its leaves, where there are any."""
    if not temporal.states:
        return None, 0
    clock, saved = finite_set_clock(axis, temporal.points), 0
    for path, state in temporal.states.items():
        weight, bias = network.layers[path].weight, network.bias(path)
        bias = None if bias is None else bias.to(clone.offload_device, weight.dtype)
        leaf = TemporalLinear(state, clock, bias, weight.dtype)
        _replace(clone, path, leaf)
        dropped = bias.nbytes if bias is not None and leaf.bias is None else 0
        saved += weight.nbytes + dropped - state.nbytes
    return clock, saved


def _replace(clone: ModelPatcher, path: str, leaf: nn.Module) -> None:
    """The layer's patches are in the leaf; the host must not add them a second time."""
    clone.add_object_patch(PREFIX + path, leaf)
    for name in ("weight", "bias"):
        clone.patches.pop(f"{PREFIX}{path}.{name}", None)
