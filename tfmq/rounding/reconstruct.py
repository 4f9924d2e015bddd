"""The driver: through the network once, from front to back, and every unit rounded on what the ones before it give.

Samples run in batches; each batch is a forward pass that halts where there is something to decide (`lanes`). The layers
of a unit are rounded by error feedback one after another, on inputs that come from the quantized part of the network.
Presets that learn then fit the whole unit to its float twin, which runs in lanes of its own on the float network's own
inputs, and go on with the better rounding. One unit's inputs and outputs are in memory at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import TfmqError
from ..formats import int4
from ..state import Rounded
from . import tree
from .adaround import Group, Settings
from .efforts import EFFORTS, NEAREST
from .equations import Equations
from .finished import Finished
from .gptq4 import LIMIT
from .hooks import Hooks
from .lanes import Lane
from .layer import Layer, Rows, grid_to
from .learn import Learner
from .meter import Meter
from .passes import Pass
from .progress import Countdown, Progress
from .samples import HELD_OUT, LEAST_ROWS, Source, batches
from .units import Unit, find_units

BUDGET = 4 << 30  # bytes of collected inputs, outputs and normal equations
NORMALS = 3  # matrices of the widest layer that may be there at once: to teach, to judge, and the float output's pull


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
    chosen = settings or EFFORTS[preset].value
    with torch.inference_mode(False), torch.no_grad():
        work = _Work(network, layers, weight, source, device, chosen, folder, budget, dtype, seed, progress)
        try:
            work.install()
            if preset == NEAREST:
                work.round_the_rest("")
            else:
                work.run()
        finally:
            work.hooks.restore()
        return work.result()


class _Work:
    """State of one run of the driver."""

    def __init__(
        self, network: nn.Module, layers: dict[str, Layer], weight: Callable[[str], Tensor], source: Source,
        device: torch.device, settings: Settings | None, folder: Path | None, budget: int, dtype: torch.dtype,
        seed: int, progress: Progress,
    ) -> None:  # fmt: skip
        modules = dict(network.named_modules())
        self.layers, self.weight, self.budget, self.device, self.seed = layers, weight, budget, device, seed
        self.source = replace(source, interval=source.interval.clone(), branch=source.branch.clone())
        wanted = [path for path, layer in layers.items() if layer.scheme.weight_bits == 4]
        self.units = {unit.path: unit for unit in find_units(network, wanted)}
        sizes = {unit.path: sum(_size(layers[path]) for path in unit.layers) for unit in self.units.values()}
        steps = 0 if settings is None else settings.iterations + settings.scale_iterations
        self.meter, self.progress = Meter(), Countdown(progress, sizes, steps)
        self.finished = Finished(self.units, layers, folder, self.progress)
        self.equations = Equations(weight, dtype, seed, self.meter)
        self.hooks = Hooks(modules, layers, self.finished.has, self.equations, device, self.meter)
        self.learner = None if settings is None else Learner(modules, settings, device, dtype, seed, self.meter)
        self.places: dict[str, Tensor] = {}
        self.count = 0  # of samples

    def install(self) -> None:
        for path, layer in self.layers.items():
            for name, value in vars(layer).items():
                if isinstance(value, Tensor) and value.is_inference():
                    setattr(layer, name, value.clone())  # autograd takes no tensor that was made in inference mode
            if layer.scheme.weight_bits == 8:
                layer.round_to_8_bits(self.weight(path))
            self.hooks.on_layer(path)
        if self.learner is not None:
            for path in self.units:
                self.hooks.on_unit(path)

    def run(self) -> None:
        self.finished.resume(self.device)
        if self.finished.complete:
            return
        self._start_passes()
        teachers = [one for one in self.hooks.passes if one.quantized]
        for one in teachers:
            self.hooks.advance(one)
        while waiting := [one for one in teachers if not one.lane.done]:
            place = waiting[0].lane.place
            assert place is not None
            there = [one for one in waiting if one.lane.place == place]
            if place.endswith(":end"):
                self._learn(self.units[place.removesuffix(":end")], there)
            else:
                self._feed_back(place)
            if self.finished.complete:
                return  # nothing behind here is of interest
            for one in there:
                self.hooks.advance(one)
        self.round_the_rest("did not run on the samples: nearest rounding")

    def round_the_rest(self, note: str) -> None:
        """Nearest rounding for what has none."""
        for path in self.finished.unit_of:
            if path not in self.finished.rounded:
                columns = int4.to_columns(self.weight(path)).float()
                grid = int4.search_grid(columns, self.layers[path].scheme.group)
                self.finished.keep(path, int4.nearest(columns, grid), grid, note)
                self.finished.tell(path)

    def _start_passes(self) -> None:
        made, passes = batches(self.source, self.seed, self._room), self.hooks.passes
        self.count = sum(len(indices) for indices in made)
        learners = max(1, len(made) - max(1, len(made) // HELD_OUT)) if len(made) > 3 else len(made)
        for quantized in (True, False) if self.learner is not None else (True,):
            for number, indices in enumerate(made):
                index = torch.tensor(indices)
                rows = Rows(self.source.interval[index], self.source.branch[index]).to(self.device)
                held = number >= learners
                one = Pass(indices, rows, quantized, held, self.source.shape[indices[0]])
                one.lane = Lane(partial(self.source.run, indices))
                passes.append(one)
        if self.learner is not None:
            half = len(made)
            for one, twin in zip(passes[:half], passes[half:], strict=True):
                one.twin, twin.twin = twin, one

    def _room(self, rows: list[int]) -> int:
        """How many rows the budget holds, found by running two of them through the float network."""
        most = 0
        if self.learner is None:
            return len(self.source.origin)
        # All units, also those that an earlier run has finished: both runs must choose the same samples.
        probe = Pass(rows[:2], self.hooks.rows, False, False, None, probing=True)
        probe.lane = Lane(partial(self.source.run, probe.indices))
        self.hooks.passes.append(probe)
        while not probe.lane.done:
            self.hooks.advance(probe)
            most = max(most, tree.nbytes((probe.inputs, probe.outputs)))
        self.hooks.passes.remove(probe)
        each = max(1, most // 2) * 2  # both of the collected and of the joined tensors
        widest = max(_size(layer) // layer.geometry.shape[0] for layer in self.layers.values())
        left = self.budget - NORMALS * 4 * widest * min(widest, LIMIT)
        if left < LEAST_ROWS * each:
            raise TfmqError(
                f"This effort needs at least {(self.budget - left + LEAST_ROWS * each) / 1e9:.1f} GB for this model "
                f"and has {self.budget / 1e9:.1f} GB: set effort to fast in TFMQ Quantize."
            )
        return min(left // each, len(self.source.origin))

    def _feed_back(self, path: str) -> None:
        began = time.perf_counter()
        layer, unit = self.layers[path], self.finished.unit_of[path]
        fed = self.equations.feed_back(path, layer)
        if self.learner is not None and any(one.unit == unit for one in self.hooks.passes):
            self.places[path] = fed.place
            layer.codes, layer.grid = fed.codes.cpu(), grid_to(fed.grid, "cpu")
        else:
            self.finished.keep(path, fed.codes, fed.grid, fed.note)
            self.finished.tell(path)
        self.meter.time("feedback", began)

    def _learn(self, unit: Unit, there: list[Pass]) -> None:
        began = time.perf_counter()
        pairs = []
        for one in there:
            twin = one.twin
            assert twin is not None
            while twin.lane.place != f"{unit.path}:end" and not twin.lane.done:
                self.hooks.advance(twin)
            if not twin.lane.done:
                pairs.append((one, twin))
        self.meter.time("float", began)
        layers = {path: self.layers[path] for path in unit.layers if self.layers[path].solved}
        learning, held = self._groups(pairs, False), self._groups(pairs, True)
        used = sum(tree.nbytes((g.args, g.kwargs, g.targets)) for g in [*learning, *held])
        self.meter.count(used)
        try:
            if layers and learning:
                note = self._fit(unit, layers, learning, held or learning)
            else:
                note = "no samples reached it"
        finally:
            self.meter.count(-used)
        for path in unit.layers:
            self.places.pop(path, None)
            layer = self.layers[path]
            if layer.codes is not None and layer.grid is not None:
                self.finished.keep(path, layer.codes, layer.grid, note)
        for path in unit.layers:
            if path in self.finished.rounded:
                self.finished.tell(path)

    def _groups(self, pairs: list[tuple[Pass, Pass]], held: bool) -> list[Group]:
        by_shape: dict[Hashable, list[tuple[Pass, Pass]]] = {}
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
        assert self.learner is not None
        call, tell = self.hooks.caller(unit.path), partial(self.progress.step, unit.path)
        learnt = self.learner.fit(unit, call, layers, self.places, learning, held, tell)
        self.finished.losses[unit.path] = learnt.losses
        if learnt.changed:
            self.hooks.changed.add(unit.path)
        return learnt.note

    def result(self) -> Result:
        return Result(self.finished.rounded, self.finished.losses, self.count, self.meter.peak, self.meter.seconds)


def _size(layer: Layer) -> int:
    return torch.Size(layer.geometry.shape).numel()
