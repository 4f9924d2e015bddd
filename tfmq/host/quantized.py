"""What rides on a quantized MODEL: the record of what was done to it, and the callbacks that keep its clones right."""

from __future__ import annotations

import copy
import logging
import uuid
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

from comfy.hooks import EnumHookMode
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..errors import TfmqError
from ..kernels import install
from ..kernels.table import pick, refusals
from ..runtime.leaf import LeafCore
from ..runtime.run_state import RunState
from ..scheme import INT, NONE, Plan
from ..timeline import Clock
from . import first_run
from .call import ClockWrapper
from .faster import attention, feed_forward, norms, precision
from .leaf import lora
from .leaf.base import HostLeaf
from .model import ATTACHMENT, PREFIX
from .temporal.leaf import TemporalLinear

WRAPPER = "tfmq_clock"
OWN_LEAVES = "tfmq_own_leaves"  # of a network: leaf of the MODEL -> its copy there
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
    temporal_clock: Clock | None = None
    deaf: tuple[str, ...] = ()
    rounding: str = ""
    backends: dict[str, dict[str, int]] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)
    advice: str = ""


def require_quantized(patcher: Any) -> Quantized:
    """The record of a quantized MODEL. Raises TfmqError for any other."""
    quantized = patcher.attachments.get(ATTACHMENT) if isinstance(patcher, ModelPatcher) else None
    if not isinstance(quantized, Quantized):
        raise TfmqError("This MODEL is not quantized by TFMQ: connect the output of TFMQ Quantize.")
    return quantized


def _backends_of(patcher: ModelPatcher, plan: Plan) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Which backend each leaf gets on the device that it loads to, and why better ones were passed over."""
    backends: dict[str, dict[str, int]] = {}
    passed_over: dict[str, str] = {}
    for path, scheme in plan.layers.items():
        if scheme.activation == NONE:
            operation, name = WEIGHT_ALONE, "decoded to float" if scheme.weight_format == INT else "bitsandbytes"
        else:
            leaf = patcher.get_model_object(PREFIX + path)
            operation, where = leaf.operation, (leaf.operation, patcher.load_device, leaf.geometry)
            name = pick(*where).name
            passed_over |= refusals(*where)
        counts = backends.setdefault(operation, {})
        counts[name] = counts.get(name, 0) + 1
    return backends, passed_over


def attach(patcher: ModelPatcher, quantized: Quantized, size: int) -> None:
    """Hang the clock, the LoRA rule and the record on a patcher whose leaves are in place, with what depends on this
    machine (`backends`, `passed_over`, `advice`) filled in. size: its true bytes."""
    backends, passed_over = _backends_of(patcher, quantized.plan)
    advice = "\n".join(filter(None, (precision.advice(patcher), install.advice(patcher.load_device, backends))))
    quantized = replace(quantized, backends=backends, passed_over=passed_over, advice=advice)
    patcher.set_attachments(ATTACHMENT, quantized)
    clocks = [clock for clock in (quantized.clock, quantized.temporal_clock) if clock is not None]
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER, ClockWrapper(*clocks))
    first_run.attach(patcher, quantized.plan)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, WRAPPER, lora.reconcile)
    if quantized.deaf:
        warning = _DeafWarning(quantized.deaf, quantized.baked)
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


class _DeafWarning:
    """ON_LOAD callback: says so where a LoRA wants to change what is no longer there. baked: as in `Quantized`."""

    def __init__(self, deaf: tuple[str, ...], baked: dict[str, int]) -> None:
        self.deaf, self.baked = deaf, baked
        self.told: tuple[str, ...] = ()

    def __call__(self, patcher: ModelPatcher, *_: Any) -> None:
        keys = (PREFIX + name for name in self.deaf)
        lost = tuple(key for key in keys if len(patcher.patches.get(key, [])) > self.baked.get(key, 0))
        if lost and lost != self.told:
            logging.warning(
                "TFMQ: the features of some temporal layers come from a cache, so a LoRA has no full effect on "
                "%s: put it before TFMQ Calibrate, or set temporal of TFMQ Quantize to another choice.",
                ", ".join(key.removeprefix(PREFIX) for key in lost),
            )
        self.told = lost
