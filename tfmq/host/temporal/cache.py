"""Cache-based maintenance in a graph: the temporal projections of a MODEL answer from a table and are never loaded.

The wrapper around each call of the network decides which rows it needs. Rows that are missing are computed with the
real weights, one module at a time and for all sigmas of the run, in the very shape of the call: matrix kernels may
round differently for another number of rows, and the aim is the same bits as without the cache.
"""

from __future__ import annotations

import logging
import math
import uuid
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor, nn

from ...errors import TfmqError
from ...temporal.cache import CachedLayer, FeatureTable, Group, Statistics, Switch, equal_rows
from ...temporal.inputs import Call, NotCovered, Projections, projections_of
from ...temporal.tib import find_tib
from ...words import counted
from ..leaf.base import HostLeaf
from ..model import PREFIX, diffusion_model_of, release
from . import table as temporal_table
from .key import Key, as_given, digest_of, timestep, to_come
from .twin import twin

NAME = "tfmq_temporal_cache"
MEGABYTE = 1e6
_NEW_NETWORK = (CallbacksMP.ON_DEEPCLONE_MULTIGPU, CallbacksMP.ON_MATCH_MULTIGPU_CLONES)


class TemporalCache:
    """Rides on the MODEL as an attachment and wraps its runs (OUTER_SAMPLE) and calls (APPLY_MODEL).

    last: the statistics of the last finished run.
    """

    def __init__(self, patcher: ModelPatcher, architecture: str, spec: Projections, budget: int) -> None:
        self.spec, self.architecture, self.budget = spec, architecture, budget
        self.layers: dict[str, CachedLayer] = {}
        self.parameters = 0
        self.nbytes = 0  # of the weights that are no longer loaded
        self.last = Statistics()
        self.switch = Switch(self._compute)
        self.table = FeatureTable(budget, 0)
        self._owner = weakref.ref(patcher)
        self._current: Any = None  # the patcher of the present call: a clone of ours may carry further LoRAs
        self._compared: set[Hashable] = set()
        self._share_rows = True
        self._ahead = True
        self._said: set[str] = set()

    # What the host calls

    def around_run(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """OUTER_SAMPLE wrapper."""
        self.table.statistics = Statistics()
        self._compared.clear()
        self._said.clear()
        self._ahead = True
        try:
            return executor(*args, **kwargs)
        finally:
            self._current = None
            self.table.all_read()
            self.last = self.table.statistics
            logging.info("TFMQ Temporal Cache: %s", describe_run(self))

    def around_call(
        self, executor: Any, x: Tensor, sigma: Tensor, c_concat: Any = None, c_crossattn: Any = None,
        control: Any = None, transformer_options: dict[str, Any] | None = None, **conds: Any,
    ) -> Any:  # fmt: skip
        """APPLY_MODEL wrapper."""
        options = transformer_options if transformer_options is not None else {}
        self.table.statistics.calls += 1
        try:
            self._prepare(executor.class_obj, x, sigma, options, conds)
            self.switch.bypass = False
        except NotCovered as why:
            self._bypass(f"{why}; such calls run on the weights")
        except Exception as error:
            if not comfy.model_management.is_oom(error):
                raise
            comfy.model_management.soft_empty_cache()
            self._bypass("there is no memory for a single row; such calls run on the weights")
        try:
            return executor(x, sigma, c_concat, c_crossattn, control, options, **conds)
        finally:
            self.switch.expected = None
            self.switch.bypass = True
            self._distrust()

    def on_detach(self, patcher: ModelPatcher, unpatch_all: bool = True, *_: Any) -> None:
        """ON_DETACH: the host wants the memory back. (A patcher that is garbage says unpatch_all=False.)"""
        if unpatch_all:
            self.table.clear()
            self._bind({})

    def on_other_network(self, patcher: ModelPatcher, clone: ModelPatcher, *_: Any) -> None:
        """ON_DEEPCLONE_MULTIGPU and ON_MATCH_MULTIGPU_CLONES: a clone with a network of its own, on another device,
        needs modules and a table of its own."""
        _detach(clone, self, patcher)
        _attach(clone, self.architecture, self.spec, list(self.layers), self.budget)

    # One call

    def _prepare(self, base: Any, x: Tensor, sigma: Tensor, options: dict[str, Any], conds: dict[str, Any]) -> None:
        """Point the modules at the rows of this call, computing them where they are missing."""
        patcher = getattr(base, "current_patcher", None) or self._owner()
        self._current = patcher
        if patcher is None:
            raise NotCovered("the MODEL is called outside of a run")
        if patcher.current_hooks is not None:
            raise NotCovered("a LoRA is switched per prompt (hooks)")
        network = getattr(base.diffusion_model, "_orig_mod", base.diffusion_model)
        device, dtype = x.device, base.get_dtype_inference()
        converted = {name: as_given(value, dtype, device) for name, value in conds.items()}
        t = timestep(base, x, sigma, converted)
        if t.shape != sigma.shape:
            raise NotCovered("it has one timestep per token")
        of = (digest_of(converted), x.shape[0], dtype, device, patcher.patches_uuid)
        key = Key.at(t, of)
        if any(rows.device != device for rows in self.table.rows.values()):
            self.table.clear()

        inputs: dict[Key, dict[str, Tensor]] = {}

        def inputs_of(key: Key, t: Tensor) -> dict[str, Tensor]:
            if key not in inputs:
                given = self.spec.inputs(network, Call(t, dtype, converted, options))
                inputs[key] = {name: given[name] for name in self.table.groups}
            return inputs[key]

        new = of not in self._compared
        if self.table.select(key):
            self.table.statistics.hits += 1
        else:
            others = {}
            if self._ahead and bool((t == t[0]).all()):
                others = to_come(base, x, sigma, options.get("sample_sigmas"), converted, of)
            self._fill(key, {key: t, **others}, inputs_of)
            if not self.table.select(key):
                raise NotCovered("its rows could not be kept")
            self._bind(inputs_of(key, t))
        if new:  # once per run and kind of call: is what we computed from what the modules get?
            self._bind(inputs_of(key, t))
            self.switch.expected = inputs_of(key, t)
            self._compared.add(of)

    def _fill(
        self, wanted: Key, times: dict[Key, Tensor], inputs_of: Callable[[Key, Tensor], dict[str, Tensor]]
    ) -> None:
        """Compute the entry that is wanted, and the others as far as there is room and memory."""
        try:
            self._compute_entries(wanted, times, inputs_of)
        except _RowsDiffer:
            self._share_rows = False
            self.table.clear()
            self._compute_entries(wanted, times, inputs_of)
        except Exception as error:
            if not comfy.model_management.is_oom(error) or len(times) == 1:
                raise
            self._ahead = False
            self.table.clear()
            comfy.model_management.soft_empty_cache()
            self._say("out of memory while computing features ahead: each is now computed when it is needed")
            self._compute_entries(wanted, {wanted: times[wanted]}, inputs_of)

    def _compute_entries(
        self, wanted: Key, times: dict[Key, Tensor], inputs_of: Callable[[Key, Tensor], dict[str, Tensor]]
    ) -> None:
        first = inputs_of(wanted, times[wanted])
        self.table.row_bytes = self._row_bytes(first)
        local: dict[Key, dict[str, list[int]]] = {}
        done: set[Key] = set()
        try:
            for key, t in times.items():
                if key in self.table:
                    continue
                index = {group: self._local(x) for group, x in inputs_of(key, t).items()}
                device = next(iter(first.values())).device
                if not self.table.reserve(key, index, device, ahead=key != wanted):
                    break
                local[key] = index
            checks: dict[Key, Tensor] = {}
            for path, layer in self.layers.items():
                real = self._real(layer, next(iter(first.values())))
                for key, index in local.items():
                    y = real(inputs_of(key, times[key])[layer.name])
                    rows = index[layer.name]
                    firsts = [rows.index(i) for i in range(1 + max(rows))]
                    unique = y if len(firsts) == len(rows) else y[firsts]
                    if unique is not y and not torch.equal(unique[rows], y):
                        raise _RowsDiffer
                    finite = torch.isfinite(y).all()
                    checks[key] = checks[key] & finite if key in checks else finite
                    if key == wanted and not bool(finite):
                        raise TfmqError(
                            f"The temporal features of layer {path} are NaN or infinite: load an intact copy of "
                            "the model, or take the LoRA off that breaks it."
                        )
                    self.table.write(key, path, unique)
            for key in local:
                if bool(checks[key]):
                    self.table.complete(key)
                    done.add(key)
            self.table.statistics.filled += wanted in done
            self.table.statistics.prefetched += len(done - {wanted})
        finally:
            for key in local.keys() - done:
                self.table.drop(key)

    def _local(self, x: Tensor) -> list[int]:
        return equal_rows(x) if self._share_rows else list(range(x.shape[0]))

    def _row_bytes(self, inputs: dict[str, Tensor]) -> int:
        """Bytes of one row of features over all modules."""
        total = 0
        for layer in self.layers.values():
            x = inputs[layer.name]
            total += self.spec.width(layer.real) * math.prod(x.shape[1:-1]) * x.element_size()
        return total

    def _bind(self, inputs: dict[str, Tensor]) -> None:
        for layer in self.layers.values():
            x = inputs.get(layer.name)
            layer.bind(None if x is None else tuple(x.shape[1:]))

    def _distrust(self) -> None:
        wrong = self.switch.wrong
        if wrong:
            for path in wrong:
                self.layers[path].trusted = False
            self._say(
                f"another input than expected for {counted(len(wrong), 'layer')} (such as {min(wrong)}): another node "
                "or a newer ComfyUI changes the embedding; what gets it runs on the weights"
            )
            wrong.clear()

    def _bypass(self, why: str) -> None:
        self.switch.bypass = True
        self.table.statistics.bypassed += 1
        self._say(why)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logging.warning("TFMQ Temporal Cache: %s", text)

    # The real weights

    def _compute(self, path: str, x: Tensor) -> Tensor:
        return self._real(self.layers[path], x)(x)  # type: ignore[no-any-return]

    def _real(self, layer: CachedLayer, like: Tensor) -> nn.Module:
        """The real module with its weights, LoRAs merged, on the device and for the dtype of `like`."""
        patcher = self._current or self._owner()
        if patcher is None:
            raise TfmqError("The MODEL behind the temporal cache is gone: run the graph again.")
        return twin(layer.real, PREFIX + layer.path, patcher, like)


class _RowsDiffer(Exception):
    """Equal rows of one call came out with different bits, so they cannot share a slot."""


def apply(patcher: Any, budget: int) -> ModelPatcher:
    """A clone of the MODEL with the cache on it. budget: bytes of the table.

    Raises TfmqError for what is no diffusion MODEL or has no temporal features that could be cached.
    """
    network = diffusion_model_of(patcher)
    if budget < 1:
        raise TfmqError("The budget of the temporal cache is less than a byte: give it a few hundred megabytes.")
    if temporal_table.of(patcher) is not None:
        raise TfmqError(
            "The temporal layers of this MODEL answer from a saved table already and have no weights for a cache to "
            "spare: use it without TFMQ Temporal Cache."
        )
    # The network shows its own modules only while no clone has others in their place.
    release(patcher)
    tib = find_tib(network)
    if not tib.layers:
        raise TfmqError(
            f"No Temporal Information Block is known in a {type(network).__name__}, so there is nothing to cache: use "
            "the MODEL without TFMQ Temporal Cache."
        )
    found = projections_of(network, tib)
    if found is None:
        raise TfmqError(
            f"The temporal features of this {tib.architecture} model depend on the prompt's tokens too, so they cannot "
            "be cached: use the MODEL without TFMQ Temporal Cache."
        )
    spec, modules = found
    clone = patcher.clone()
    earlier = clone.attachments.get(NAME)
    if isinstance(earlier, TemporalCache):
        _detach(clone, earlier, clone)
        clone.size = clone.model_size() + earlier.nbytes
    # A quantized temporal layer is small and may follow the clock of the call, so it is left alone.
    paths = [path for path in modules if not isinstance(clone.get_model_object(PREFIX + path), HostLeaf)]
    if not paths:
        raise TfmqError(
            "All temporal layers of this MODEL are quantized by TFMQ already, so there is nothing to cache: use it as "
            "it is."
        )
    size = clone.model_size()
    cache = _attach(clone, tib.architecture, spec, paths, budget)
    clone.size = size - cache.nbytes
    clone.patches_uuid = uuid.uuid4()  # without a new one the host takes the modules for loaded and leaves them be
    return clone


def require(patcher: Any) -> TemporalCache:
    """The cache on a MODEL. Raises TfmqError for a MODEL without."""
    cache = patcher.attachments.get(NAME) if isinstance(patcher, ModelPatcher) else None
    if not isinstance(cache, TemporalCache):
        raise TfmqError("This MODEL has no temporal cache: connect the output of TFMQ Temporal Cache.")
    return cache


def describe(patcher: ModelPatcher, steps: tuple[int, ...] = (20, 50)) -> str:
    """What the cache on this MODEL spares and what its table will take, before any run."""
    cache = require(patcher)
    dtype = patcher.model.get_dtype_inference()
    row = slot_bytes(cache, dtype)
    lines = [
        f"{cache.architecture}: a table answers for {counted(len(cache.layers), 'temporal layer')}; "
        f"{cache.parameters / 1e6:.2f} M parameters ({cache.nbytes / MEGABYTE:.1f} MB) are no longer loaded",
        f"one timestep takes {row / MEGABYTE:.3f} MB per distinct row ({str(dtype).removeprefix('torch.')}): "
        + ", ".join(f"{n} steps {n * row / MEGABYTE:.1f} MB" for n in steps)
        + f"; budget {cache.budget / MEGABYTE:.0f} MB",
    ]
    if row * steps[0] > cache.nbytes:
        lines.append(f"not worth it for memory: {steps[0]} steps take more than the weights")
    return "\n".join(lines)


def slot_bytes(cache: TemporalCache, dtype: torch.dtype) -> int:
    """Bytes that one timestep takes per distinct row, for features of `dtype`."""
    per_module = 344 if cache.architecture == "chroma" else 1  # rows of the modulation index
    return sum(cache.spec.width(layer.real) for layer in cache.layers.values()) * per_module * dtype.itemsize


def describe_run(cache: TemporalCache) -> str:
    """One line about the last run."""
    s = cache.table.statistics
    text = (
        f"{s.hits} of {s.calls} calls from the table ({100 * s.hit_rate:.0f} %), {s.filled} computed on demand, "
        f"{s.prefetched} ahead, {s.evicted} evicted; table {cache.table.nbytes / MEGABYTE:.2f} MB, "
        f"{cache.nbytes / MEGABYTE:.1f} MB of weights not loaded"
    )
    return text + (f"; {counted(s.bypassed, 'call')} ran on the weights" if s.bypassed else "")


def _attach(clone: ModelPatcher, architecture: str, spec: Projections, paths: list[str], budget: int) -> TemporalCache:
    cache = TemporalCache(clone, architecture, spec, budget)
    for path in paths:
        real = clone.get_model_object(PREFIX + path)  # a quantized layer stands here already as an object patch
        if isinstance(real, CachedLayer):  # the network is loaded at this moment
            real = real.real
        name = spec.group(path)
        group = cache.table.groups.setdefault(name, Group())
        cache.layers[path] = CachedLayer(path, real, name, group, cache.switch, cache.table)
        cache.parameters += sum(p.numel() for p in real.parameters())
        cache.nbytes += comfy.model_management.module_size(real)
        clone.add_object_patch(PREFIX + path, cache.layers[path])
    clone.set_attachments(NAME, cache)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, NAME, cache.around_run)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, NAME, cache.around_call)
    clone.add_callback_with_key(CallbacksMP.ON_DETACH, NAME, cache.on_detach)
    for call in _NEW_NETWORK:
        clone.add_callback_with_key(call, NAME, cache.on_other_network)
    return cache


def _is_object_patch(patcher: ModelPatcher, key: str, real: nn.Module) -> bool:
    """Whether the module that stands behind the cache is another node's and not the network's own."""
    if key in patcher.object_patches_backup:
        return patcher.object_patches_backup[key] is not real
    return patcher.model.get_submodule(key) is not real


def _detach(clone: ModelPatcher, cache: TemporalCache, patcher: ModelPatcher) -> None:
    """Take `cache`, which was made for `patcher`, off a clone of it."""
    for path, layer in cache.layers.items():
        clone.object_patches.pop(PREFIX + path, None)
        if _is_object_patch(patcher, PREFIX + path, layer.real):
            clone.object_patches[PREFIX + path] = layer.real
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL):
        clone.remove_wrappers_with_key(kind, NAME)
    for call in (CallbacksMP.ON_DETACH, *_NEW_NETWORK):
        clone.remove_callbacks_with_key(call, NAME)
