"""Temporal layers without their weights: a saved curve over the time axis answers in their place, for any sampler.

For models whose Temporal Information Block depends on t alone. At the time of saving, the features of all its layers
are fitted over all t (`tfmq.temporal.curve`); at the time of loading, each of the layers becomes a `TableLinear`, which
mixes a few saved rows by weights that are worked out once per call of the network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import ModelSamplingDiscrete, ModelSamplingDiscreteEDM
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import TfmqError
from ...files import smallest_exact
from ...runtime.leaf import LeafCore
from ...temporal.curve import fit
from ...temporal.features import EMBEDDING, TemporalGraph, inner_layers, temporal_graph
from ...temporal.inputs import Call, NotCovered, projections_of
from ...temporal.table import Moment, Removed, TemporalTable
from ...temporal.tib import Tib, find_tib
from ...timeline import TimeAxis
from ...words import Choice
from ..model import PREFIX
from .key import timestep

NAME = "tfmq_temporal_table"
WEIGHTS, TABLE = "weights", "table"
SAVED_AS = {
    WEIGHTS: Choice("as they are"),
    TABLE: Choice(
        "rows for all timesteps in place of the weights (Qwen-Image, AuraFlow, Wan 2.1, Lumina 2, Z-Image, "
        "PixArt-Sigma, SD1.5)"
    ),
}
CHUNK = 256  # timesteps that go through the device at a time
_UNCOVERED = {"lumina2": ("ref_latents", "ref_contexts", "siglip_feats")}


def make(
    patcher: ModelPatcher, baked: ModelPatcher, axis: TimeAxis, progress: Callable[[int, int], None]
) -> TemporalTable:
    """Fit the temporal features of a MODEL over all t of `axis`.

    patcher: not loaded by any clone. baked: has those patches that are part of the model. progress: called with
    (done, total). Raises TfmqError where the temporal features depend on more than t, are NaN, or come from layers that
    are quantized already.
    """
    network = patcher.model.diffusion_model
    tib = find_tib(network)
    _require_t_alone(network, tib)
    for path in tib.layers:
        layer = patcher.get_model_object(PREFIX + path)
        weight = getattr(layer, "weight", None)
        if isinstance(layer, LeafCore) or isinstance(weight, QuantizedTensor) or _is_integer(weight):
            raise TfmqError(
                f'Temporal layer {path} is quantized already, so a table of it would keep that error: choose "float" '
                'as temporal in TFMQ Quantize, or "weights" here.'
            )
    # The wiring alone: the weights of a large model are too many to hold twice.
    names = [f"{path}.{part}" for path in tib.layers for part in ("weight", "bias")]
    empty = dict.fromkeys(names, torch.zeros(1, 1))
    graph = temporal_graph(network, embed=lambda t: t, weights=empty, tib=tib)
    source = _Source(graph, _embedding(network, tib, graph), baked)
    inner = inner_layers(graph, tib.architecture)
    layers = {path: source.function(path) for path in graph.layers if path not in inner}
    sampling = patcher.get_model_object("model_sampling")
    discrete = isinstance(sampling, ModelSamplingDiscrete) and not isinstance(sampling, ModelSamplingDiscreteEDM)
    points = {"points": round(axis.high - axis.low) + 1} if discrete else {}

    def tell(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress(done, total)

    curve = fit(layers, axis, discrete=discrete, progress=tell, **points)
    removed, nbytes = {}, 0
    for path in graph.layers:
        module = network.get_submodule(path)
        dtype = str(smallest_exact(source.parameter(path, "weight")).dtype).removeprefix("torch.")
        removed[path] = Removed(tuple(module.weight.shape), module.bias is not None, dtype)
        nbytes += module.weight.nbytes + (0 if module.bias is None else module.bias.nbytes)
    return TemporalTable(tib.architecture, removed, curve, nbytes)


def _require_t_alone(network: nn.Module, tib: Tib) -> None:
    instead = 'choose "weights" in TFMQ Save'
    if not tib.layers:
        raise TfmqError(
            f"No Temporal Information Block is known in a {type(network).__name__}, so there is nothing that a table "
            f"could stand for: {instead}."
        )
    other = sorted(set(tib.layers.values()) - {"t"})
    if "per-token t" in other:
        raise TfmqError(
            f"This {tib.architecture} model has a timestep per token, so a table over the timestep cannot take the "
            f"place of its temporal weights: {instead}."
        )
    if other:
        raise TfmqError(
            f"The temporal features of this {tib.architecture} model depend on more than the timestep "
            f"({', '.join(other)}), so a table over the timestep cannot take the place of their weights: {instead}."
        )


def _is_integer(weight: Any) -> bool:
    return not isinstance(weight, Tensor) or not weight.dtype.is_floating_point


class _Caught(Exception):
    pass


def _embedding(network: nn.Module, tib: Tib, graph: TemporalGraph) -> Callable[[Tensor], Tensor]:
    """t [T] -> what the first layer of the network's own embedder gets, float32."""
    found = projections_of(network, tib)
    if found is None:
        raise TfmqError(f'The embedding of t of this {tib.architecture} model is not known: choose "weights".')
    spec, first = found[0], next(iter(graph.layers))

    def embed(t: Tensor) -> Tensor:
        caught: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            caught.append(args[0])
            raise _Caught

        handle = network.get_submodule(first).register_forward_pre_hook(hook)
        try:
            spec.inputs(network, Call(t, torch.float32))
        except (_Caught, NotCovered):
            pass
        finally:
            handle.remove()
        if not caught or caught[0].shape[0] != t.shape[0]:
            raise TfmqError(f'This ComfyUI embeds t of a {tib.architecture} model in a new way: choose "weights".')
        return caught[0].reshape(t.shape[0], -1).float()

    return embed


class _Source:
    """Features in float32, one layer's weights on the load device at a time; what the layers read is kept per t."""

    def __init__(self, graph: TemporalGraph, embed: Callable[[Tensor], Tensor], baked: ModelPatcher) -> None:
        self.graph, self.embed, self.baked = graph, embed, baked
        self._inputs: dict[tuple[bytes, str], Tensor] = {}
        self._last: tuple[str, Tensor, Tensor | None] | None = None

    def parameter(self, path: str, name: str) -> Tensor:
        """As it would be saved, with the patches that are part of the model, on the load device."""
        device = self.baked.load_device
        found = self.baked.patch_weight_to_device(f"{PREFIX}{path}.{name}", device_to=device, return_weight=True)
        return found.detach().to(device)  # type: ignore[no-any-return]

    def function(self, path: str) -> Callable[[Tensor], Tensor]:
        return lambda t: self._features(path, t)

    def _features(self, path: str, t: Tensor) -> Tensor:
        layer = self.graph.layers[path]
        x = self._input(layer.source, t)
        x = F.silu(x) if layer.silu else x
        weight, bias = self._parameters(path)
        parts = [F.linear(part.to(weight.device), weight, bias).cpu() for part in x.split(CHUNK)]
        found = torch.cat(parts)
        if not bool(torch.isfinite(found).all()):
            raise TfmqError(
                f"Temporal layer {path} gives NaN or infinite values, so there is no table of it: load an intact copy "
                "of the model."
            )
        return found

    def _input(self, source: str, t: Tensor) -> Tensor:
        key = (t.numpy().tobytes(), source)
        if key not in self._inputs:
            self._inputs[key] = self.embed(t) if source == EMBEDDING else self._features(source, t)
        return self._inputs[key]

    def _parameters(self, path: str) -> tuple[Tensor, Tensor | None]:
        if self._last is None or self._last[0] != path:
            has_bias = self.baked.model.diffusion_model.get_submodule(path).bias is not None
            bias = self.parameter(path, "bias").float() if has_bias else None
            self._last = (path, self.parameter(path, "weight").float(), bias)
        return self._last[1:]


class TableLinear(nn.Module):
    """Stands in for a temporal Linear: no parameters, answers with rows of the table for the t of the present call.

    It keeps its keys in state dicts, with a single number behind them, so that a LoRA that targets it arrives and can
    be named (`OnLoad`) instead of vanishing.
    """

    rows: Tensor | None

    def __init__(self, path: str, removed: Removed, rows: Tensor | None, moment: Moment) -> None:
        super().__init__()
        self.path, self.moment = path, moment
        self.out_features, self.in_features = removed.shape
        self.register_buffer("rows", rows, persistent=False)
        self.weight = torch.zeros(())
        self.bias = torch.zeros(()) if removed.bias else None

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        if self.rows is None:  # only read by other layers of the table, which do not look at it; whoever does notices
            return x.new_full(shape, torch.nan)
        now = self.moment
        if now.weights is None:
            raise TfmqError(
                "This MODEL has a temporal table and is called by something that does not tell it the timestep: sample "
                'with ComfyUI\'s samplers, or save it with "weights".'
            )
        weights, batch = now.weights, x.shape[0]
        if batch != weights.shape[0]:
            if not (now.more and 2 * batch == weights.shape[0]):
                raise TfmqError(
                    f"Temporal layer {self.path} gets {batch} rows for {weights.shape[0]} timesteps, which a temporal "
                    'table cannot answer: save the model with "weights" for this graph.'
                )
            weights = weights[:batch]
        rows = self.rows.to(x.device)
        if now.index is None:
            y = weights @ rows.float()
        else:
            y = (rows[now.index[:batch]].float() * weights.unsqueeze(-1)).sum(1)
        return y.to(x.dtype).reshape(batch, *[1] * (x.dim() - 2), -1).expand(shape)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **_: Any) -> Tensor:
        """Called by the host before it merges a patch of a hook: something of the right shape."""
        return torch.zeros(self.out_features, self.in_features, device=weight.device)

    def convert_bias(self, bias: Tensor, inplace: bool = False, **_: Any) -> Tensor:
        return torch.zeros(self.out_features, device=bias.device)

    def set_weight(self, weight: Tensor, return_weight: bool = False, **_: Any) -> Tensor | None:
        """Called by the host with a merged weight: there is nothing that it could change."""
        if return_weight:
            return torch.zeros(())
        _say([self.path])
        return None

    set_bias = set_weight

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class MomentWrapper:
    """APPLY_MODEL wrapper: writes the t of the call that begins into the moment of the network's table."""

    def __init__(self, architecture: str, path: str) -> None:
        self.architecture, self.path = architecture, path

    def __call__(self, executor: Any, x: Tensor, sigma: Tensor, *args: Any, **conds: Any) -> Any:
        base = executor.class_obj
        options = conds.get("transformer_options") or (args[3] if len(args) > 3 else {})
        self._refuse(options or {}, conds)
        given = {name: value for name, value in conds.items() if name not in ("x", "transformer_options", "control")}
        t = timestep(base, x, sigma, given)
        if t.shape != sigma.shape:
            raise TfmqError(
                "This run has one timestep per frame or token, which a temporal table does not hold: save the model "
                'with "weights" for it.'
            )
        network = getattr(base.diffusion_model, "_orig_mod", base.diffusion_model)
        layer = network.get_submodule(self.path)
        # Edits with Qwen-Image may modulate their reference pictures as at t = 0, by rows behind the others.
        more = self.architecture == "qwen_image" and bool(conds.get("ref_latents"))
        layer.moment.set(torch.cat([t, t * 0]) if more else t, more)
        return executor(x, sigma, *args, **conds)

    def _refuse(self, options: dict[str, Any], conds: dict[str, Any]) -> None:
        if "emb_patch" in options.get("patches", {}):
            raise TfmqError(
                "Another node changes the embedding of t (emb_patch), which a temporal table cannot follow: save the "
                'model with "weights" for this graph.'
            )
        for name in _UNCOVERED.get(self.architecture, ()):
            value = conds.get(name)
            if value is not None and len(value):
                raise TfmqError(
                    f"The reference pictures of this run ({name}) have a timestep of their own, which a temporal table "
                    'does not follow: save the model with "weights" for it.'
                )


def attach(patcher: ModelPatcher, table: TemporalTable) -> None:
    """Put the table's layers into the network of a freshly built MODEL, and hang what they need on it."""
    moment = Moment(table.curve)
    for path, removed in table.layers.items():
        leaf = TableLinear(path, removed, table.curve.rows.get(path), moment)
        comfy.utils.set_attr(patcher.model, PREFIX + path, leaf)
    patcher.set_attachments(NAME, table)
    first = next(iter(table.layers))
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, NAME, MomentWrapper(table.architecture, first))
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, NAME, OnLoad())


class OnLoad:
    """ON_LOAD callback: the host moves only layers that have parameters. And LoRAs are known now."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def __call__(self, patcher: ModelPatcher, device: torch.device | None, *_: Any) -> None:
        table = of(patcher)
        assert table is not None
        targeted = []
        for path in table.layers:
            leaf = patcher.get_model_object(PREFIX + path)
            if device is not None:
                leaf.to(device)
            if any(f"{PREFIX}{path}.{part}" in patcher.patches for part in ("weight", "bias")):
                targeted.append(path)
        if targeted and targeted != self.told:
            _say(targeted)
        self.told = targeted


def _say(paths: list[str]) -> None:
    logging.warning(
        "TFMQ: a LoRA targets layers whose weights were saved as a temporal table, so it has no effect there: %s. "
        'Apply it before TFMQ Quantize, or save the model with "weights".',
        ", ".join(paths),
    )


def of(patcher: ModelPatcher) -> TemporalTable | None:
    """The table on a MODEL, if it has one."""
    table = patcher.attachments.get(NAME)
    return table if isinstance(table, TemporalTable) else None
