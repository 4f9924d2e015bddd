"""The driver: through the network once, from front to back, and every unit rounded on what the ones before it give.

Samples run in batches; each batch is a forward pass that halts where there is something to decide (`lanes`). The layers
of a unit are rounded by error feedback one after another, on inputs that come from the quantized part of the network.
Presets that learn then fit the whole unit to its float twin, which runs in lanes of its own on the float network's own
inputs, and go on with the better rounding. One unit's inputs and outputs are in memory at a time.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TfmqError
from ..formats import int4
from ..state import Rounded
from . import tree
from .adaround import Call, Group, Settings, Starting, adaround, measure
from .checkpoint import read_unit, write_unit
from .forwards import Forwards, plain_parameters
from .gptq4 import LIMIT, Gram, feedback, input_columns
from .lanes import Lane
from .layer import Layer, Rows, grid_to
from .progress import Countdown
from .scales import Scales, tune_scales
from .units import Unit, find_units

NEAREST, FAST, BALANCED, BEST = "nearest", "fast", "balanced", "best"
BEST_PLUS = "best+"  # balanced, and `finetune` behind it
SETTINGS = {
    # No AdaRound: from the codes of the corrected error feedback it found nothing in hundreds of steps (measured).
    BALANCED: Settings(iterations=0, scale_iterations=150, batch=16, rate=1e-2),
    BEST: Settings(iterations=20_000, scale_iterations=5_000, batch=32, rate=1e-3),  # Q-Diffusion's
}
BUDGET = 4 << 30  # bytes of collected inputs, outputs and normal equations
# Rows per pass: odd numbers that no other dimension of a tensor is likely to be a multiple of.
BATCHES = (31, 17, 7, 5, 3, 2)
LEAST_ROWS = 8
HELD_OUT = 8  # one batch in so many judges and does not teach
POSITIONS = 16384  # of the normal equations of one layer, or four times its columns if that is more
NORMALS = 3  # matrices of the widest layer that may be there at once: to teach, to judge, and the float output's pull
GAIN = 0.99  # a reconstruction counts from this ratio of held-out losses on

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Source:
    """The samples. run: makes the network compute the given rows in one pass (its result is not looked at).
    interval, branch: int64 [R]. origin: [R], rows of one number came from one picture. shape: [R], rows of one value
    can share a pass."""

    run: Callable[[list[int]], object]
    interval: Tensor
    branch: Tensor
    origin: Sequence[int]
    shape: Sequence[Hashable]


@dataclass(frozen=True)
class Result:
    """layers: path -> rounding. losses: unit -> (start, end), on held-out samples. rows: samples that were used.
    peak_bytes: most bytes of collected inputs, outputs and normal equations at a time. biases, note: of `finetune`."""

    layers: dict[str, Rounded]
    losses: dict[str, tuple[float, float]]
    rows: int
    peak_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    note: str = ""


def reconstruct(
    network: nn.Module,
    layers: dict[str, Layer],
    weight: Callable[[str], Tensor],
    source: Source,
    preset: str,
    *,
    device: torch.device,
    progress: Progress = lambda done, total, left: None,
    folder: Path | None = None,
    budget: int = BUDGET,
    settings: Settings | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Result:
    """Round the 4-bit layers of a network.

    layers: all layers that are quantized, those of 8 bits included; their codes are set here. weight: path -> float
    weight [N, K, ...] as it meets the balanced and rotated input. settings: of the learning presets, instead of their
    own. dtype: of the products while a unit learns. folder: where finished units are kept and found again; it belongs
    to this request alone. progress: called with (done, total, seconds left); what it raises passes through.
    The modules of the network are as before on every way out. Raises TfmqError for too few samples.
    """
    chosen = settings or SETTINGS.get(preset)
    with torch.inference_mode(False), torch.no_grad():
        work = _Work(network, layers, weight, source, device, chosen, folder, budget, dtype, seed, progress)
        try:
            work.install()
            if preset == NEAREST:
                work.round_the_rest("")
            else:
                work.run()
        finally:
            work.restore()
        return work.result()


@dataclass(eq=False)
class _Pass:
    """One batch on its way through the network."""

    indices: list[int]
    rows: Rows
    quantized: bool
    held: bool
    shape: Hashable
    lane: Lane = field(init=False)
    probing: bool = False
    unit: str | None = None
    passed: set[str] = field(default_factory=set)
    twin: _Pass | None = None  # the same rows in the other network, where there is one
    columns: Tensor | None = None  # of the layer at which it waits, until the twin has come there
    chosen: Tensor | None = None
    inputs: Any = None  # (args, kwargs) of the unit that it stands in, on the CPU
    outputs: list[Tensor] = field(default_factory=list)


class _Work:
    """State of one run of the driver."""

    def __init__(
        self, network: nn.Module, layers: dict[str, Layer], weight: Callable[[str], Tensor], source: Source,
        device: torch.device, settings: Settings | None, folder: Path | None, budget: int, dtype: torch.dtype,
        seed: int, progress: Progress,
    ) -> None:  # fmt: skip
        self.modules = dict(network.named_modules())
        self.layers, self.weight, self.source = layers, weight, source
        self.device, self.settings, self.folder, self.budget = device, settings, folder, budget
        self.training_dtype, self.seed = dtype, seed
        wanted = [path for path, layer in layers.items() if layer.scheme.weight_bits == 4]
        self.units = {unit.path: unit for unit in find_units(network, wanted)}
        self.unit_of = {path: unit.path for unit in self.units.values() for path in unit.layers}
        self.rounded: dict[str, Rounded] = {}
        self.places: dict[str, Tensor] = {}
        self.grams: dict[tuple[str, bool], Gram] = {}  # by layer, and whether they judge or teach
        self.current: tuple[str, Tensor] | None = None  # a layer and its weight's columns
        self.losses: dict[str, tuple[float, float]] = {}
        self.seconds: dict[str, float] = {}
        self.changed: set[str] = set()
        self.passes: list[_Pass] = []
        self._forwards = Forwards()
        # What the network's modules read while they run.
        self.now: _Pass | None = None
        self.quantized, self.rows, self.dtype = False, Rows(torch.zeros(1).long(), torch.zeros(1).long()), torch.float32
        self.used = self.peak = self.corrected = 0
        sizes = {unit.path: sum(_size(layers[path]) for path in unit.layers) for unit in self.units.values()}
        steps = 0 if settings is None else settings.iterations + settings.scale_iterations
        self.progress = Countdown(progress, sizes, steps)
        self.count = 0  # of samples

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def install(self) -> None:
        self.source = replace(self.source, interval=self.source.interval.clone(), branch=self.source.branch.clone())
        for path, layer in self.layers.items():
            for name, value in vars(layer).items():
                if isinstance(value, Tensor) and value.is_inference():
                    setattr(layer, name, value.clone())  # autograd takes no tensor that was made in inference mode
            if layer.scheme.weight_bits == 8:
                layer.round_to_8_bits(self.weight(path))
            self._forwards.replace(self.modules[path], self._layer_forward(path, self.modules[path].forward))
        if self.settings is not None:
            for path in self.units:
                self._forwards.replace(self.modules[path], self._unit_forward(path, self.modules[path].forward))

    def restore(self) -> None:
        for one in self.passes:
            one.lane.close()
        self.passes.clear()
        self._forwards.restore()

    def _layer_forward(self, path: str, original: Any) -> Any:
        layer = self.layers[path]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            one = self.now
            if not self.quantized:
                if one is not None and one.twin is not None and one.twin.lane.place == path:
                    self._add_pull(path, layer, x, one.twin)
                    one.lane.stop(path)
                return original(x, *args, **kwargs)
            if layer.solved or layer.trained is not None:
                return layer.compute(x, self.rows, self.dtype)
            assert one is not None
            quantized = layer.quantized_input(x, self.rows)
            self._add(path, layer, quantized, one)
            one.lane.stop(path)
            return layer.multiply(quantized).to(x.dtype)

        return forward

    def _unit_forward(self, path: str, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            one = self.now
            if one is None or one.unit is not None or path in one.passed:
                return original(*args, **kwargs)
            if self._finished(path) and not one.probing:
                return original(*args, **kwargs)
            one.passed.add(path)
            one.unit = path
            if one.quantized or one.probing:
                one.inputs = tree.map_tensors((args, kwargs), _kept)
            result = original(*args, **kwargs)
            one.outputs = [_kept(t) for t in outputs(result)]
            held = tree.nbytes((one.inputs, one.outputs))
            self._count(held)
            one.lane.stop(f"{path}:end")
            if one.quantized and path in self.changed:
                args, kwargs = tree.map_tensors(one.inputs, lambda t: t.to(self.device, copy=True))
                result = original(*args, **kwargs)
            one.unit, one.inputs, one.outputs = None, None, []
            self._count(-held)
            return result

        return forward

    def _finished(self, unit: str) -> bool:
        return all(path in self.rounded for path in self.units[unit].layers)

    def _add(self, path: str, layer: Layer, quantized: Tensor, one: _Pass) -> None:
        """Take the input of a layer into its normal equations, or into those that judge."""
        if layer.geometry.groups != 1 or (one.held and one.twin is None):
            return
        columns = input_columns(quantized, _window(layer))
        key = (path, one.held)
        if key not in self.grams:
            self.grams[key] = Gram(columns.shape[1], columns.device)
            self._count(self.grams[key].nbytes)
        gram = self.grams[key]
        alike = sum(other.quantized and other.held == one.held for other in self.passes)
        most = -(-max(POSITIONS, 4 * columns.shape[1]) // max(1, alike))
        one.chosen = None
        if columns.shape[0] > most:
            generator = torch.Generator().manual_seed(self.seed + gram.positions)
            one.chosen = torch.randperm(columns.shape[0], generator=generator)[:most].to(columns.device)
            columns = columns[one.chosen]
        gram.add(columns, self.training_dtype)
        one.columns = columns if one.twin is not None else None

    def _add_pull(self, path: str, layer: Layer, x: Tensor, twin: _Pass) -> None:
        """The same for what the float network has there. twin: the quantized pass, which waits at this layer."""
        if twin.columns is None:
            return
        if self.current is None or self.current[0] != path:
            self.current = (path, int4.to_columns(self.weight(path)).float())
        columns = input_columns(layer.plain_input(x), _window(layer))
        if twin.chosen is not None:
            columns = columns[twin.chosen]
        if columns.shape == twin.columns.shape:
            missing = (columns - twin.columns) @ self.current[1].t()
            self.grams[path, twin.held].add_pull(twin.columns, missing)
        twin.columns = None

    def _count(self, nbytes: int) -> None:
        self.used += nbytes
        self.peak = max(self.peak, self.used)

    # ---- the way through the network -------------------------------------------------------------------------------

    def run(self) -> None:
        self._resume()
        if len(self.rounded) == len(self.unit_of):
            return
        self._start_passes()
        teachers = [one for one in self.passes if one.quantized]
        for one in teachers:
            self._advance(one)
        while waiting := [one for one in teachers if not one.lane.done]:
            place = waiting[0].lane.place
            assert place is not None
            there = [one for one in waiting if one.lane.place == place]
            if place.endswith(":end"):
                self._learn(self.units[place.removesuffix(":end")], there)
            else:
                self._feed_back(place)
            if len(self.rounded) == len(self.unit_of):
                return  # nothing behind here is of interest
            for one in there:
                self._advance(one)
        self.round_the_rest("did not run on the samples: nearest rounding")

    def round_the_rest(self, note: str) -> None:
        """Nearest rounding for what has none."""
        for path, unit in self.unit_of.items():
            if path not in self.rounded:
                columns = int4.to_columns(self.weight(path)).float()
                grid = int4.search_grid(columns, self.layers[path].scheme.group)
                self._keep(path, int4.nearest(columns, grid), grid, note)
                self._done(path, unit)

    def _advance(self, one: _Pass) -> str | None:
        self.now, self.quantized, self.rows, self.dtype = one, one.quantized, one.rows, torch.float32
        try:
            place = one.lane.advance()
        finally:
            self.now, self.quantized = None, False
        if one.quantized and one.twin is not None and place is not None and one.columns is not None:
            self._advance(one.twin)
        return place

    def _start_passes(self) -> None:
        batches = self._batches()
        self.count = sum(len(indices) for indices in batches)
        learners = max(1, len(batches) - max(1, len(batches) // HELD_OUT)) if len(batches) > 3 else len(batches)
        for quantized in (True, False) if self.settings is not None else (True,):
            for number, indices in enumerate(batches):
                index = torch.tensor(indices)
                rows = Rows(self.source.interval[index], self.source.branch[index]).to(self.device)
                held = number >= learners
                one = _Pass(indices, rows, quantized, held, self.source.shape[indices[0]])
                one.lane = Lane(partial(self.source.run, indices))
                self.passes.append(one)
        if self.settings is not None:
            half = len(batches)
            for one, twin in zip(self.passes[:half], self.passes[half:], strict=True):
                one.twin, twin.twin = twin, one

    def _batches(self) -> list[list[int]]:
        """Batches of rows of one shape; the last ones are of pictures that no other batch has, where that is possible.

        As many rows as the budget allows.
        """
        generator = torch.Generator().manual_seed(self.seed)
        by_shape: dict[Hashable, list[int]] = {}
        for i in torch.randperm(len(self.source.origin), generator=generator).tolist():
            by_shape.setdefault(self.source.shape[i], []).append(i)
        rows = max(by_shape.values(), key=len) if by_shape else []
        if len(rows) < LEAST_ROWS:
            raise TfmqError(
                f"The calibration holds {len(rows)} samples that reconstruction can use, and it takes at least "
                f"{LEAST_ROWS}: calibrate again with more steps or prompts."
            )
        fitting = self._rows_in_budget(rows)
        total = sum(len(found) for found in by_shape.values())
        size = next(b for b in BATCHES if b <= max(2, min(fitting, total) // 8) or b == 2)
        batches = []
        for found in by_shape.values():
            share = min(len(found), fitting * len(found) // total)
            found = sorted(found[:share], key=lambda i: self.source.origin[i])
            batches += [found[start : start + size] for start in range(0, len(found) - size + 1, size)]
        return batches

    def _rows_in_budget(self, rows: list[int]) -> int:
        """How many rows the budget holds, found by running two of them through the float network."""
        most = 0
        if self.settings is None:
            return len(self.source.origin)
        # All units, also those that an earlier run has finished: both runs must choose the same samples.
        probe = _Pass(rows[:2], self.rows, False, False, None, probing=True)
        probe.lane = Lane(partial(self.source.run, probe.indices))
        self.passes.append(probe)
        while not probe.lane.done:
            self._advance(probe)
            most = max(most, tree.nbytes((probe.inputs, probe.outputs)))
        self.passes.remove(probe)
        each = max(1, most // 2) * 2  # both of the collected and of the joined tensors
        widest = max(_size(layer) // layer.geometry.shape[0] for layer in self.layers.values())
        left = self.budget - NORMALS * 4 * widest * min(widest, LIMIT)
        if left < LEAST_ROWS * each:
            raise TfmqError(
                f"This effort needs at least {(self.budget - left + LEAST_ROWS * each) / 1e9:.1f} GB for this model "
                f"and has {self.budget / 1e9:.1f} GB: set effort to fast in TFMQ Quantize."
            )
        return min(left // each, len(self.source.origin))

    # ---- one layer, one unit ---------------------------------------------------------------------------------------

    def _feed_back(self, path: str) -> None:
        began = time.perf_counter()
        layer, gram = self.layers[path], self.grams.pop((path, False), None)
        judge = self.grams.pop((path, True), None)
        columns = int4.to_columns(self.weight(path)).float().contiguous()
        if gram is None:
            grid = int4.search_grid(columns, layer.scheme.group)
            codes, note = int4.nearest(columns, grid), "no samples reached it: nearest rounding"
            place = int4.place(columns, grid).clamp_(0, int4.TOP)
        else:
            grid = int4.search_grid(columns, layer.scheme.group, gram.mean_square)
            codes, place = feedback(columns, grid, gram)
            note = "error feedback"
            if gram.pull is not None:
                moved = gram.moved(columns)
                trial = int4.search_grid(moved, layer.scheme.group, gram.mean_square)
                other = feedback(moved, trial, gram)
                judge = judge or gram
                if judge.excess(int4.values(other[0], trial) - columns) < judge.excess(
                    int4.values(codes, grid) - columns
                ):
                    (codes, place), grid = other, trial
                    self.corrected += 1
        self._count(-sum(one.nbytes for one in {id(g): g for g in (gram, judge) if g is not None}.values()))
        self.current = None
        self.places[path] = place
        unit = self.unit_of[path]
        learning = self.settings is not None and any(one.unit == unit for one in self.passes)
        if learning:
            layer.codes, layer.grid = codes.cpu(), grid_to(grid, "cpu")
        else:
            del self.places[path]
            self._keep(path, codes, grid, note)
            self._done(path, unit)
        self._time("feedback", began)

    def _learn(self, unit: Unit, there: list[_Pass]) -> None:
        began = time.perf_counter()
        pairs = []
        for one in there:
            twin = one.twin
            assert twin is not None
            while twin.lane.place != f"{unit.path}:end" and not twin.lane.done:
                self._advance(twin)
            if not twin.lane.done:
                pairs.append((one, twin))
        self._time("float", began)
        layers = {path: self.layers[path] for path in unit.layers if self.layers[path].solved}
        learning, held = self._groups(pairs, False), self._groups(pairs, True)
        used = sum(tree.nbytes((g.args, g.kwargs, g.targets)) for g in [*learning, *held])
        self._count(used)
        try:
            if layers and learning:
                note = self._fit(unit, layers, learning, held or learning)
            else:
                note = "no samples reached it"
        finally:
            self._count(-used)
        for path in unit.layers:
            self.places.pop(path, None)
            layer = self.layers[path]
            if layer.codes is not None and layer.grid is not None:
                self._keep(path, layer.codes, layer.grid, note)
        for path in unit.layers:
            if path in self.rounded:
                self._done(path, unit.path)

    def _groups(self, pairs: list[tuple[_Pass, _Pass]], held: bool) -> list[Group]:
        by_shape: dict[Hashable, list[tuple[_Pass, _Pass]]] = {}
        for one, twin in pairs:
            if one.held == held:
                by_shape.setdefault(one.shape, []).append((one, twin))
        groups = []
        for found in by_shape.values():
            sizes = [len(one.indices) for one, _ in found]
            args, kwargs, targets = tree.concatenate([(*one.inputs, twin.outputs) for one, twin in found], sizes)
            rows = Rows(*(torch.cat([getattr(one.rows, name) for one, _ in found]) for name in ("interval", "branch")))
            groups.append(Group(args, kwargs, targets, rows.to(torch.device("cpu"))))
        return groups

    def _fit(self, unit: Unit, layers: dict[str, Layer], learning: list[Group], held: list[Group]) -> str:
        """Learn the rounding of one unit; the layers hold the result. Returns how it went."""
        assert self.settings is not None
        module, settings = self.modules[unit.path], self.settings
        forward = module.forward
        seed = self.seed + zlib.crc32(unit.path.encode())

        def call(args: Any, kwargs: Any, rows: Rows, dtype: torch.dtype) -> list[Tensor]:
            self.quantized, self.rows, self.dtype = True, rows, dtype
            try:
                return outputs(forward(*args, **kwargs))
            finally:
                self.quantized = False

        def tell() -> None:
            self.progress.step(unit.path)

        for layer in layers.values():
            layer.act_scale = None if layer.act_scale is None else layer.act_scale.to(self.device)
        with plain_parameters(module, {self.modules[path] for path in layers}, self.device):
            before = measure(call, held, self.device, settings.batch)
            note, after = "error feedback", before
            if settings.iterations:
                note, after = self._round_together(unit, call, layers, learning, held, before, tell)
            began = time.perf_counter()
            if settings.scale_iterations:
                old = Scales.of(layers)
                scales = tune_scales(
                    call, layers, learning, settings.scale_iterations, settings.batch, self.device,
                    self.training_dtype, seed + 1, tell,
                )  # fmt: skip
                scales.put(layers)
                tuned = measure(call, held, self.device, settings.batch)
                if tuned < after:
                    note += f", scales tuned: {tuned:.3g}"
                    after = tuned
                    self.changed.add(unit.path)
                    for path in scales.activation:
                        layers[path].ranges_tuned = True
                else:
                    old.put(layers)
            self._time("scales", began)
        self.losses[unit.path] = (before, after)
        return note

    def _round_together(
        self, unit: Unit, call: Call, layers: dict[str, Layer], learning: list[Group], held: list[Group], before: float,
        tell: Callable[[], None],
    ) -> tuple[str, float]:  # fmt: skip
        """AdaRound of one unit, kept if the held-out loss falls. Returns how it went and the loss."""
        assert self.settings is not None
        settings, began = self.settings, time.perf_counter()
        start = {p: Starting(self.places[p], _codes(layer)) for p, layer in layers.items() if p in self.places}
        found = adaround(
            call, layers, start, before, learning, settings, self.device, self.training_dtype,
            self.seed + zlib.crc32(unit.path.encode()), tell,
        )  # fmt: skip
        self._time("adaround", began)
        kept = {path: _codes(layers[path]) for path in found}
        for path, codes in found.items():
            layers[path].codes = codes.cpu()
        after = measure(call, held, self.device, settings.batch)
        if after < GAIN * before:
            self.changed.add(unit.path)
            return f"reconstructed: loss {before:.3g} -> {after:.3g}", after
        for path, codes in kept.items():
            layers[path].codes = codes
        why = "no gain" if after <= before * 1.5 else "diverged"
        return f"error feedback kept, reconstruction {why}: loss {before:.3g} -> {after:.3g}", before

    def _keep(self, path: str, codes: Tensor, grid: int4.Grid, note: str) -> None:
        layer = self.layers[path]
        layer.codes, layer.grid = codes.cpu(), grid_to(grid, "cpu")
        scale = zero = None
        if layer.ranges_tuned and layer.act_scale is not None and layer.act_zero_point is not None:
            scale, zero = layer.act_scale.cpu(), layer.act_zero_point.cpu()
        self.rounded[path] = Rounded(layer.codes, layer.grid, scale, zero, note)

    def _done(self, path: str, unit: str) -> None:
        if self._finished(unit):
            self._save(self.units[unit])
        layers = self.units[unit].layers
        self.progress.finish(unit, sum(p in self.rounded for p in layers) / len(layers))

    # ---- files -----------------------------------------------------------------------------------------------------

    def _save(self, unit: Unit) -> None:
        if self.folder is not None:
            write_unit(self.folder, unit, {p: self.rounded[p] for p in unit.layers}, self.losses.get(unit.path))

    def _resume(self) -> None:
        if self.folder is None:
            return
        for unit in self.units.values():
            found = read_unit(self.folder, unit)
            if found is None:
                continue
            kept, loss = found
            for path, rounded in kept.items():
                layer = self.layers[path]
                if rounded.act_scale is not None:
                    layer.act_scale = rounded.act_scale.to(self.device)
                    layer.ranges_tuned = True
                layer.codes, layer.grid = rounded.codes, rounded.grid
                self.rounded[path] = rounded
            if loss is not None:
                self.losses[unit.path] = loss
            self.progress.found(unit.path)

    def result(self) -> Result:
        return Result(self.rounded, self.losses, self.count, self.peak, self.seconds)

    def _time(self, what: str, began: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began


def outputs(result: Any) -> list[Tensor]:
    """The floating tensors that a module gives back."""
    return [tensor for tensor in tree.tensors(result) if tensor.is_floating_point()]


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _codes(layer: Layer) -> Tensor:
    assert layer.codes is not None
    return layer.codes


def _size(layer: Layer) -> int:
    return torch.Size(layer.geometry.shape).numel()


def _window(layer: Layer) -> tuple[tuple[int, ...], ...] | None:
    g = layer.geometry
    return (g.shape[2:], g.stride, g.padding, g.dilation) if g.is_conv else None
