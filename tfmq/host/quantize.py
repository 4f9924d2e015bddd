"""The last arrow in the graph: solved layers into a clone of the MODEL."""

from __future__ import annotations

import copy
import logging
import time
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management
from comfy.hooks import EnumHookMode
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor, nn

from ..decide.edit import edited
from ..decide.plan import decide
from ..decide.tdq import over_time
from ..errors import TfmqError
from ..geometry import Geometry, geometry_of
from ..kernels import install
from ..kernels.table import CONV2D_STATIC, LINEAR_DYNAMIC, LINEAR_STATIC, costs_of, pick, refusals
from ..observe.calibration import Calibration
from ..rounding.reconstruct import Result
from ..runtime.leaf import LeafCore
from ..runtime.run_state import RunState
from ..scheme import INT, NONE, ROUNDINGS, STATIC, Plan, Recipe
from ..solve.layer import solve_layer
from ..state import LayerState
from ..temporal.tib import boundary_layers
from ..timeline import Clock
from . import bits, first_run
from .call import ClockWrapper
from .faster import attention, feed_forward, norms, precision
from .leaf import lora, nf4
from .leaf.base import HostLeaf
from .leaf.leaf import make_leaf
from .model import (
    ATTACHMENT,
    PREFIX,
    candidates,
    fingerprint,
    float_weight,
    kept_in_float,
    require_float_model,
    sampling_kind,
)
from .rounding import run as reconstruct
from .temporal import quantize as temporal_quant
from .temporal.leaf import TemporalLinear, TemporalState, finite_set_clock

WRAPPER = "tfmq_clock"
OWN_LEAVES = "tfmq_own_leaves"  # of a network: leaf of the MODEL -> its copy there
SECONDS_BETWEEN_LINES = 15.0  # of the log, while weights are rounded
SMALL_BYTES = 16 * 1024  # of a module, up to which the host's dynamic loading loads it whole
WEIGHT_ALONE = "weight_alone"  # what a layer with activations in float is listed under


@dataclass(frozen=True)
class Quantized:
    """Rides on a quantized MODEL as an attachment: what was done to it.

    `kinds`: layer path -> "linear" or "conv2d". `model`, `sampling`: fingerprint and kind of sampling of the float
    model. `bytes_before`, `bytes_after`: of the network's parameters. `baked`: how many patches of each remaining key
    were there when it was quantized; later ones are somebody's LoRA and not part of the model. `backends`: operation
    -> backend -> number of layers, on the machine at hand. `temporal_clock`: of the temporal leaves, where there are
    any; `deaf`: parameters of the network that a later LoRA cannot change, or not fully. `advice`: how it
    would be faster here, in a sentence. `rounding`: how fine-tuning went, where there was any.
    """

    plan: Plan
    kinds: dict[str, str]
    model: str
    sampling: str
    clock: RunState
    bytes_before: int
    bytes_after: int
    baked: dict[str, int]
    backends: dict[str, dict[str, int]] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)
    temporal_clock: Clock | None = None
    deaf: tuple[str, ...] = ()
    advice: str = ""
    rounding: str = ""


def quantize(
    patcher: ModelPatcher, calibration: Calibration, recipe: Recipe, progress: Any, changes: str = ""
) -> ModelPatcher:
    """A clone of the MODEL whose layers compute in integers. progress: called with (done, total).

    changes: a plan as JSON (`tfmq.decide.edit`), or nothing.

    LoRA patches that are on the MODEL are merged before rounding. Raises TfmqError for a MODEL or calibration that
    does not fit.
    """
    network = require_float_model(patcher)
    _require_same(patcher, calibration)
    modules = candidates(network)
    keep = kept_in_float(network) | _unknown_ends(network, calibration) | too_small(patcher, modules)
    geometries: dict[str, Geometry] = {}
    for path, module in modules.items():
        geometry = geometry_of(module)
        if isinstance(geometry, str):
            keep[path] = geometry
        else:
            geometries[path] = geometry
    kinds = {path: "conv2d" if isinstance(m, nn.Conv2d) else "linear" for path, m in modules.items()}
    device = patcher.load_device
    costs = costs_of(device, geometries.values())
    plan = decide(recipe, calibration, kinds, keep, costs)
    if recipe.mixed:
        plan = bits.mixed_plan(patcher, calibration, recipe, keep, geometries, costs, progress)
    if changes.strip():
        plan = edited(plan, changes, calibration, keep, costs)
    nf4.require_for(plan, device)
    grids = over_time(plan, calibration)
    found = _rounded(patcher, calibration, plan, progress)
    rounded = {} if found is None else found.layers

    clone = patcher.clone()
    moved = {} if found is None else found.biases
    # Of layers that stay in float; like any weight patch these travel with the MODEL, and are merged where it is saved.
    patches = {f"{PREFIX}{path}.bias": ("diff", (by,)) for path, by in moved.items() if path not in plan.layers}
    if patches:
        clone.add_patches(patches)
    clock = RunState(calibration.axis, calibration.partition)
    offload = patcher.offload_device
    before = comfy.model_management.module_size(network)
    saved = 0
    first = temporal_quant.steps(network, recipe.temporal)
    total = first + len(plan.layers)
    temporal_clock, deaf = None, tuple[str, ...]()
    if recipe.temporal != temporal_quant.FLOAT:
        temporal = temporal_quant.solve(
            patcher, network, recipe.temporal, calibration.axis, lambda done, _: progress(done, total)
        )
        left = {path: why for path, why in plan.left.items() if path not in temporal.reasons}
        plan = replace(plan, left=left, temporal=temporal.reasons)
        temporal_clock, deaf = finite_set_clock(calibration.axis, temporal.points), temporal.deaf
        for path, temporal_state in temporal.states.items():
            saved += _put_temporal(clone, patcher, path, modules[path], temporal_state, temporal_clock)
    for done, (path, scheme) in enumerate(plan.layers.items()):
        comfy.model_management.throw_exception_if_processing_interrupted()
        key = PREFIX + path
        module = modules[path]
        weight = float_weight(patcher, f"{key}.weight")
        try:
            if scheme.weight_format != INT:
                state = nf4.solve(scheme, weight)
            else:
                state = solve_layer(
                    scheme, calibration.layers[path], weight, recipe.ranges, grids.get(path), rounded.get(path)
                )
        except FloatingPointError as error:
            raise TfmqError(f"Layer {path} cannot be quantized: {error}; load an intact copy of the model.") from None
        bias = None
        if module.bias is not None:
            bias = float_weight(patcher, f"{key}.bias")
            if path in moved:
                bias = bias.float() + moved[path].to(bias.device)
            bias = bias.to(offload, weight_of(module).dtype)
        leaf = make_leaf(module, state_to(state, offload), geometries[path], clock, bias, weight_of(module).dtype)
        clone.add_object_patch(key, leaf)
        for name in (f"{key}.weight", f"{key}.bias"):
            clone.patches.pop(name, None)  # merged above; the host must not add them a second time
        saved += weight_of(module).nbytes - state.nbytes
        progress(first + done + 1, total)
    baked = {key: len(patches) for key, patches in clone.patches.items()}
    backends, passed_over = backends_of(plan, geometries, device)
    attach(
        clone,
        Quantized(
            plan, {path: kinds[path] for path in plan.layers}, calibration.model, calibration.sampling, clock,
            before, before - saved, baked, backends, passed_over, temporal_clock, deaf,
            rounding="" if found is None else found.note,
        ),
        patcher.model_size() - saved,
    )  # fmt: skip
    return clone


def _rounded(patcher: ModelPatcher, calibration: Calibration, plan: Plan, progress: Any) -> Result | None:
    """The codes of the 4-bit layers, by the recipe's way of rounding; None for nearest."""
    fours = any(scheme.weight_bits == 4 and scheme.weight_format == INT for scheme in plan.layers.values())
    if plan.recipe.rounding == ROUNDINGS[0] or not fours:
        return None
    told = time.monotonic()

    def tell(done: int, total: int, left: float) -> None:
        nonlocal told
        progress(done, total)
        if time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            logging.info("TFMQ: rounding weights, %d of %d, about %d s left", done, total, left)

    return reconstruct(patcher, calibration, plan, plan.recipe.rounding, tell)


def _put_temporal(
    clone: ModelPatcher, patcher: ModelPatcher, path: str, module: nn.Module, state: TemporalState, clock: Clock
) -> int:
    """Hang a temporal leaf into `clone` in place of `module`; returns the bytes that this saves."""
    key, weight, bias = PREFIX + path, weight_of(module), None
    if module.bias is not None:
        bias = float_weight(patcher, f"{key}.bias").to(patcher.offload_device, weight.dtype)
    leaf = TemporalLinear(state, clock, bias, weight.dtype)
    clone.add_object_patch(key, leaf)
    for name in (f"{key}.weight", f"{key}.bias"):
        clone.patches.pop(name, None)
    dropped = bias.nbytes if isinstance(bias, Tensor) and leaf.bias is None else 0
    return weight.nbytes + dropped - state.nbytes


def attach(patcher: ModelPatcher, quantized: Quantized, size: int) -> None:
    """Hang the clock, the LoRA rule and the record on a patcher whose leaves are in place. size: its true bytes."""
    sentences = precision.advice(patcher), install.advice(patcher.load_device, quantized.backends)
    quantized = replace(quantized, advice="\n".join(filter(None, sentences)))
    patcher.set_attachments(ATTACHMENT, quantized)
    clocks = [clock for clock in (quantized.clock, quantized.temporal_clock) if clock is not None]
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER, ClockWrapper(*clocks))
    first_run.attach(patcher, quantized.plan)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, WRAPPER, lora.reconcile)
    if quantized.deaf:
        warning = temporal_quant.DeafWarning(quantized.deaf, quantized.baked)
        patcher.add_callback_with_key(CallbacksMP.ON_LOAD, WRAPPER, warning)
    patcher.add_callback_with_key(CallbacksMP.ON_APPLY_HOOKS, WRAPPER, lora.unhook)
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, WRAPPER, lora.unhook)
    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, WRAPPER, lora.warn_of_bypass)
    patcher.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, WRAPPER, lora.unhook_behind_keyframes)
    # The faster mode copies merged float weights from a cache right over the codes.
    patcher.set_hook_mode(EnumHookMode.MinVram)
    attention.attach(patcher)
    patcher.state_dict_for_saving = _refuse_to_save
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, WRAPPER, _settle)
    patcher.add_callback_with_key(CallbacksMP.ON_DEEPCLONE_MULTIGPU, WRAPPER, _part)
    _fuse(patcher, quantized.plan)
    patcher.size = size
    patcher.patches_uuid = uuid.uuid4()  # without a new one the host takes the leaves for loaded and leaves them be


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """In place of a patcher's method that the host's own saving calls: it would write codes without their scales."""
    raise TfmqError(
        "This MODEL is quantized by TFMQ, which ComfyUI's own nodes for saving cannot write: connect it to TFMQ Save."
    )


def _fuse(patcher: ModelPatcher, plan: Plan) -> None:
    feed_forward.attach(patcher, plan)
    norms.attach(patcher, plan)


def _settle(patcher: ModelPatcher, clone: ModelPatcher) -> None:
    """ON_CLONE callback. For torch.compile, hooked LoRAs and other devices the host clones a MODEL onto a network of
    its own, made anew: what was bound to the old network is made for that one, and its leaves get the clock that is
    set."""
    clone.state_dict_for_saving = _refuse_to_save
    if clone.model is patcher.model:
        return
    _give_own_leaves(clone)
    quantized = require_quantized(clone)
    for module in clone.model.diffusion_model.modules():
        if isinstance(module, TemporalLinear) and quantized.temporal_clock is not None:
            module.clock = quantized.temporal_clock
        elif isinstance(module, LeafCore):
            module.clock = quantized.clock
    _fuse(clone, quantized.plan)


def _part(patcher: ModelPatcher, clone: ModelPatcher) -> None:
    """ON_DEEPCLONE_MULTIGPU callback. The clone will run on another GPU at the same time, in a thread of its own: it
    must not have leaves in common with the MODEL. The host clones onto that network again for every run."""
    setattr(clone.model, OWN_LEAVES, weakref.WeakKeyDictionary())
    _give_own_leaves(clone)


def _give_own_leaves(clone: ModelPatcher) -> None:
    """Where the network is one of another GPU: copies of the leaves, the same ones each time."""
    own = getattr(clone.model, OWN_LEAVES, None)
    if own is None:
        return
    for key, leaf in clone.object_patches.items():
        if isinstance(leaf, HostLeaf):
            if leaf not in own:
                own[leaf] = copy.deepcopy(leaf)
            clone.object_patches[key] = own[leaf]


def state_to(state: LayerState, device: Any) -> LayerState:
    """The state with all its tensors on `device`."""
    tensors: dict[str, Any] = {name: v.to(device) for name, v in vars(state).items() if isinstance(v, Tensor)}
    return replace(state, **tensors)


def backends_of(
    plan: Plan, geometries: dict[str, Geometry], device: Any
) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Which backend each layer of the plan gets on this device, and why better ones were passed over."""
    backends: dict[str, dict[str, int]] = {}
    passed_over: dict[str, str] = {}
    for path, scheme in plan.layers.items():
        geometry = geometries[path]
        operation = LINEAR_STATIC if scheme.activation == STATIC else LINEAR_DYNAMIC
        operation = CONV2D_STATIC if geometry.is_conv else operation
        if scheme.activation == NONE:
            how = "decoded to float" if scheme.weight_format == INT else "bitsandbytes"
            counts = backends.setdefault(WEIGHT_ALONE, {})
            counts[how] = counts.get(how, 0) + 1
            continue
        name = pick(operation, device, geometry).name
        counts = backends.setdefault(operation, {})
        counts[name] = counts.get(name, 0) + 1
        passed_over |= refusals(operation, device, geometry)
    return backends, passed_over


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


def too_small(patcher: ModelPatcher, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layers of up to 16 KiB in 4 bits. Dynamic loading takes their weights out and puts them back by their path, when
    a module of another MODEL may stand there."""
    if not patcher.is_dynamic():
        return {}
    why = "too small for dynamic loading"
    return {path: why for path, module in modules.items() if weight_of(module).numel() <= 2 * SMALL_BYTES}


def _unknown_ends(network: nn.Module, calibration: Calibration) -> dict[str, str]:
    """First and last layer by the order of execution, for an architecture that no table knows."""
    if boundary_layers(network):
        return {}
    paths = list(calibration.layers)
    return {paths[0]: "first layer (by order of execution)", paths[-1]: "last layer (by order of execution)"}


def weight_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def require_quantized(patcher: Any) -> Quantized:
    """The record of a quantized MODEL. Raises TfmqError for any other."""
    quantized = patcher.attachments.get(ATTACHMENT) if isinstance(patcher, ModelPatcher) else None
    if not isinstance(quantized, Quantized):
        raise TfmqError("This MODEL is not quantized by TFMQ: connect the output of TFMQ Quantize.")
    return quantized
