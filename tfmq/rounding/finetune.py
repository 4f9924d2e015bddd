"""Fine-tuning of a whole quantized network against its float self: the last stage of the preset "best+".

QuEST (2402.03666): of a network whose rounding is done, the scales of the activations and a small part of the weights
are trained with the straight-through estimator, all layers quantized at once, so that the prediction is that of the
float network on the same inputs. Block reconstruction sees one unit at a time and cannot know which of its
errors the rest of the network forgives.

Trained here, all at once, by Adam with a cosine to 0: the scale of the static activation and of every output channel
of each 4-bit layer, both as the logarithm of the scale over its start, and the biases of these layers and of those that
read nothing but the timestep (QuEST's time embedding layers, float here). Loss: squared error of the prediction over
that of the start in the same interval. The state with the least loss on pictures that do not teach is kept, if that is
less than the start's by more than chance.

A unit's activations are dropped and computed again in backward, so that those of one unit and the inputs of all are in
memory at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..state import Rounded
from . import tree
from .adaround import Draw, Group, fit
from .forwards import Forwards, plain_parameters
from .layer import Layer, Rows
from .progress import Progress
from .recompute import Recomputed
from .samples import HELD_OUT, Source
from .units import find_units
from .variables import Variable, Variables

WEIGHTS = 1 << 30  # bytes of decoded weights that are kept between steps
LEAST = 1e-4  # of the largest error of an interval, that another one's counts at least
CERTAIN = 2.0  # standard errors that the gain on held-out rows must have
BACKWARD = 4  # passes that a step with its backward, and what that computes again, takes


@dataclass(frozen=True)
class Settings:
    """Iterations, rows of each, iterations between two looks at the held-out rows; learning rates of the logarithm of
    activation scales, of that of weight scales, and of the temporal biases over their root mean square."""

    iterations: int
    batch: int
    every: int
    activation_rate: float
    weight_rate: float
    bias_rate: float


SETTINGS = Settings(iterations=240, batch=4, every=40, activation_rate=4e-4, weight_rate=4e-4, bias_rate=4e-4)


@dataclass(frozen=True)
class Tuned:
    """layers: path -> rounding, of the start where nothing was better. biases: path of a quantized or temporal layer ->
    what is added to its bias, float32 [N] on the CPU. losses: (start, end), squared error on held-out rows over that of
    the start in their interval. note: how it went."""

    layers: dict[str, Rounded]
    biases: dict[str, Tensor]
    losses: tuple[float, float]
    note: str


class _Stopped(Exception):
    """The loss is no number any more."""


def finetune(
    network: nn.Module,
    layers: dict[str, Layer],
    start: dict[str, Rounded],
    source: Source,
    *,
    device: torch.device,
    temporal: Collection[str] = (),
    progress: Progress = lambda done, total, left: None,
    settings: Settings | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tuned:
    """Tune a network whose layers are all rounded.

    layers: as `reconstruct` has left them; start: its result. temporal: paths of the layers whose bias may be trained.
    The rest: `reconstruct`. The modules of the network and the layers are as before on every way out.
    """
    with torch.inference_mode(False), torch.no_grad():
        work = _Work(network, layers, start, source, device, temporal, settings or SETTINGS, dtype, seed, progress)
        with work.installed():
            return work.run()


class _Work:
    """State of one run."""

    def __init__(
        self, network: nn.Module, layers: dict[str, Layer], start: dict[str, Rounded], source: Source,
        device: torch.device, temporal: Collection[str], settings: Settings, dtype: torch.dtype, seed: int,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.network, self.modules = network, dict(network.named_modules())
        self.layers, self.start, self.source, self.device = layers, start, source, device
        self.temporal, self.settings, self.dtype, self.seed = temporal, settings, dtype, seed
        self.progress, self.began, self.spent, self.total = progress, time.monotonic(), 0, 0
        self.units = {unit.path: unit for unit in find_units(network, list(layers))}
        self.variables = Variables(self.modules, layers, start, self.units)
        # What the network's modules read while they run.
        self.rows: Rows | None = None  # None: in float
        self.product_dtype = torch.float32
        self.prediction: list[Tensor] = []
        self.weight = torch.ones(len(source.origin))  # of a row's prediction

    # ---- hooks -----------------------------------------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Iterator[None]:
        kept = [(layer, dict(vars(layer))) for layer in self.layers.values()]
        makers: list[tuple[str, Callable[[str, Any], Any]]] = [(path, self._layer_forward) for path in self.layers]
        makers += [*((path, self._unit_forward) for path in self.units), ("", self._network_forward)]
        try:
            with Forwards() as forwards:
                for path, make in makers:
                    forwards.replace(self.modules[path], make(path, self.modules[path].forward))
                yield
        finally:
            for layer, values in kept:
                vars(layer).update(values)

    def _layer_forward(self, path: str, original: Any) -> Any:
        layer = self.layers[path]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.rows is None:
                return original(x, *args, **kwargs)
            return layer.compute(x, self.rows, self.product_dtype)

        return forward

    def _unit_forward(self, path: str, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.rows is None or not torch.is_grad_enabled():
                return original(*args, **kwargs)
            return self._recomputed(original, self.variables.owned.get(path, []), args, kwargs)

        return forward

    def _network_forward(self, _: str, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree.map_tensors((args, kwargs), lambda t: t.clone() if t.is_inference() else t)
            result = original(*args, **kwargs)
            self.prediction = tree.outputs(result)
            return result

        return forward

    def _recomputed(self, original: Any, owned: list[Variable], args: Any, kwargs: Any) -> Any:
        """The unit's result, with nothing kept for backward but its inputs."""
        rows, dtype = self.rows, self.product_dtype
        given = [t for t in tree.tensors((args, kwargs)) if t.is_floating_point()]
        shape = tree.map_tensors((args, kwargs), Tensor.detach)
        box: list[Any] = []

        def run(values: Sequence[Tensor]) -> Any:
            inputs = iter(values)
            # Clones: a unit may write to its inputs.
            a, k = tree.map_tensors(shape, lambda t: next(inputs).clone() if t.is_floating_point() else t)
            before = [one.holder[one.name] for one in owned], self.rows, self.product_dtype
            self.rows, self.product_dtype = rows, dtype
            try:
                for one, value in zip(owned, inputs, strict=True):
                    one.holder[one.name] = value
                return original(*a, **k)
            finally:
                for one, value in zip(owned, before[0], strict=True):
                    one.holder[one.name] = value
                self.rows, self.product_dtype = before[1:]

        found = iter(Recomputed.apply(run, box, *given, *(one.holder[one.name] for one in owned)))
        return tree.map_tensors(box.pop(), lambda t: next(found) if t.is_floating_point() else t)

    # ---- the way ---------------------------------------------------------------------------------------------------

    def run(self) -> Tuned:
        teaching, held = self._groups()
        floating = {self.modules[path] for path in self.layers}
        with plain_parameters(self.network, floating, self.device, widen=False):
            self._decode()
            s = self.settings
            self.variables.make(
                self.temporal, self.device,
                activation_rate=s.activation_rate, weight_rate=s.weight_rate, bias_rate=s.bias_rate,
            )  # fmt: skip
            self.variables.put()
            start = self._weigh(teaching, held)
            before = float(start.mean())
            best, after, note = None, start, ""
            if not math.isfinite(before):
                note = "fine-tuning left out: the prediction on the samples is not finite"
            else:
                try:
                    for errors in self._train(teaching, held):
                        if errors.mean() < after.mean():
                            best, after = [one.leaf.detach().clone() for one in self.variables.all.values()], errors
                except _Stopped:
                    note = "fine-tuning diverged and was stopped"
            gain = start - after
            if best is None or gain.mean() < CERTAIN * gain.std(correction=0) / math.sqrt(len(gain)):
                note = note or "fine-tuning found nothing that is certainly better"
                return Tuned(self.start, {}, (before, before), f"{note}: balanced kept")
            for one, leaf in zip(self.variables.all.values(), best, strict=True):
                one.leaf = leaf
            end = float(after.mean())
            note = f"{note}; " if note else ""
            note += f"fine-tuned: error of the prediction {math.sqrt(end / before):.3f} of what it was"
            return Tuned(*self.variables.result(note), (before, end), note)

    def _groups(self) -> tuple[list[Group], list[Group]]:
        """Rows that teach and rows that judge, with what the float network predicts. args: numbers of the rows."""
        origins = sorted(set(self.source.origin))
        apart = set(origins[-max(1, len(origins) // HELD_OUT) :]) if len(origins) > 1 else set()
        cells: dict[tuple[bool, Hashable], list[int]] = {}
        for i, origin in enumerate(self.source.origin):
            held = origin in apart if apart else i % HELD_OUT == HELD_OUT - 1
            cells.setdefault((held, self.source.shape[i]), []).append(i)
        judging = sum(len(indices) for (held, _), indices in cells.items() if held)
        looks = 1 + -(-self.settings.iterations // self.settings.every)
        self.total = (
            len(self.source.origin) + looks * judging + self.settings.iterations * self.settings.batch * BACKWARD
        )
        groups: tuple[list[Group], list[Group]] = ([], [])
        for (held, _), indices in cells.items():
            found: list[list[Tensor]] = []
            for start in range(0, len(indices), self.settings.batch):
                part = indices[start : start + self.settings.batch]
                self.source.run(part)
                found.append([t.detach().to("cpu", torch.float32, copy=True) for t in self.prediction])
                self._tell(len(part))
            at = torch.tensor(indices)
            rows = Rows(self.source.interval[at].clone(), self.source.branch[at].clone())
            groups[held].append(Group(at, {}, [torch.cat(parts) for parts in zip(*found, strict=True)], rows))
        if not groups[False] or not groups[True]:
            groups = (groups[False] or groups[True], groups[True] or groups[False])
        return groups

    def _errors(self, groups: Sequence[Group]) -> Tensor:
        """Mean squared error of the prediction of every row, float32 [rows]."""
        found = []
        for group in groups:
            for rows in torch.arange(group.count).split(self.settings.batch):
                part = group.take(rows, self.device)
                ys = self._call(part.args, {}, part.rows, torch.float32)
                parts = [(y - t).square().flatten(1).mean(1) for y, t in zip(ys, part.targets, strict=True)]
                found.append(torch.stack(parts).sum(0).cpu())
        return torch.cat(found)

    def _weigh(self, teaching: Sequence[Group], held: Sequence[Group]) -> Tensor:
        """Divide what rows predict by the root of the start's error in their interval, as found on the held-out rows.
        Returns the errors of these, so divided.

        A few rows would decide otherwise: on the demo model the largest error of one is 75 times the median, and which
        way it falls is chance, since the least change of a scale rounds all activations anew.
        """
        errors = self._errors(held)
        interval = torch.cat([group.rows.interval for group in held]).cpu()
        sums = torch.zeros(int(self.source.interval.max()) + 1).index_add_(0, interval, errors)
        counts = torch.zeros_like(sums).index_add_(0, interval, torch.ones_like(errors))
        seen = counts.nonzero().flatten()
        nearest = (torch.arange(len(sums)).unsqueeze(1) - seen).abs().argmin(1)
        means = (sums[seen] / counts[seen])[nearest]
        means = means.clamp_min(max(LEAST * float(means.max()), torch.finfo(torch.float32).tiny))
        self.weight = means.rsqrt()[self.source.interval.cpu()]
        for group in {id(group): group for group in (*teaching, *held)}.values():
            for target in group.targets:
                target.mul_(self.weight[group.args].view(-1, *[1] * (target.dim() - 1)))
        return errors / means[interval]

    def _decode(self) -> None:
        """Decoded weights as long as there is room; the others are decoded whenever they are needed."""
        left = WEIGHTS
        for layer in self.layers.values():
            size = 4 * torch.Size(layer.geometry.shape).numel()
            if size <= left:
                layer.trained = layer.weight(self.device)
                left -= size

    def _call(self, indices: Tensor, _: Any, rows: Rows, dtype: torch.dtype) -> list[Tensor]:
        self.rows, self.product_dtype = rows, dtype
        indices = indices.cpu()
        try:
            self.source.run(indices.tolist())
            weight = self.weight[indices].to(self.device)
            found = [y.float() * weight.view(-1, *[1] * (y.dim() - 1)) for y in self.prediction]
            for y in found:
                if y.requires_grad:
                    # Adam does not mind a factor, and 16 bits do not hold the small gradients of a mean.
                    y.register_hook(partial(torch.mul, float(y.numel())))
        finally:
            self.rows, self.prediction = None, []
        self._tell(len(indices) * (BACKWARD if torch.is_grad_enabled() else 1))
        return found

    def _train(self, teaching: Sequence[Group], held: Sequence[Group]) -> Iterator[Tensor]:
        """Trains, and yields the errors of the held-out rows now and then."""
        s, variables = self.settings, list(self.variables.all.values())
        optimizer = torch.optim.Adam([{"params": [one.leaf], "lr": one.rate} for one in variables])
        draw = Draw(teaching, self.seed)
        for step in range(1, s.iterations + 1):
            for group, one in zip(optimizer.param_groups, variables, strict=True):
                group["lr"] = one.rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / s.iterations))
            part = draw.take(s.batch, self.device)
            optimizer.zero_grad()
            with torch.enable_grad():
                fit(self._call, part, self.dtype, self.variables.put)
            if not all(one.leaf.grad is None or bool(torch.isfinite(one.leaf.grad).all()) for one in variables):
                raise _Stopped
            optimizer.step()
            if step % s.every == 0 or step == s.iterations:
                self.variables.put()
                yield self._errors(held)

    def _tell(self, rows: int) -> None:
        """So many rows more have passed through the network."""
        self.spent = min(self.spent + rows, self.total)
        left = (time.monotonic() - self.began) * (self.total - self.spent) / self.spent
        self.progress(self.spent, self.total, left)
