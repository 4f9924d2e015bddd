"""Learning the rounding of one unit: AdaRound and then scales, each kept if it helps on samples that do not teach."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adaround import Call, Group, Settings, Starting, adaround, measure
from .forwards import plain_parameters
from .layer import Layer
from .meter import Meter
from .scales import Scales, tune_scales
from .units import Unit

GAIN = 0.99  # a reconstruction counts from this ratio of held-out losses on


class Learnt(NamedTuple):
    """note: how it went. losses: (start, end), held out. changed: whether the unit computes something else now."""

    note: str
    losses: tuple[float, float]
    changed: bool


@dataclass(frozen=True)
class Learner:
    """dtype: of the products while a unit learns."""

    modules: dict[str, nn.Module]
    settings: Settings
    device: torch.device
    dtype: torch.dtype
    seed: int
    meter: Meter

    def fit(
        self, unit: Unit, call: Call, layers: dict[str, Layer], places: dict[str, Tensor], learning: list[Group],
        held: list[Group], tell: Callable[[], None],
    ) -> Learnt:  # fmt: skip
        """Learn the rounding of one unit; its layers hold the result.

        call: the unit on its rounded layers. layers: of these. places: of their weights on the grid before they were
        rounded. tell: called after every step.
        """
        settings = self.settings
        for layer in layers.values():
            layer.act_scale = None if layer.act_scale is None else layer.act_scale.to(self.device)
        with plain_parameters(self.modules[unit.path], {self.modules[path] for path in layers}, self.device):
            before = measure(call, held, self.device, settings.batch)
            note, after, changed = "error feedback", before, False
            if settings.iterations:
                note, after, changed = self._round_together(unit, call, layers, places, learning, held, before, tell)
            began = time.perf_counter()
            if settings.scale_iterations:
                old = Scales.of(layers)
                scales = tune_scales(
                    call, layers, learning, settings.scale_iterations, settings.batch, self.device, self.dtype,
                    self._seed(unit) + 1, tell,
                )  # fmt: skip
                scales.put(layers)
                tuned = measure(call, held, self.device, settings.batch)
                if tuned < after:
                    note += f", scales tuned: {tuned:.3g}"
                    after, changed = tuned, True
                    for path in scales.activation:
                        layers[path].ranges_tuned = True
                else:
                    old.put(layers)
            self.meter.time("scales", began)
        return Learnt(note, (before, after), changed)

    def _round_together(
        self, unit: Unit, call: Call, layers: dict[str, Layer], places: dict[str, Tensor], learning: list[Group],
        held: list[Group], before: float, tell: Callable[[], None],
    ) -> tuple[str, float, bool]:  # fmt: skip
        """AdaRound of one unit, kept if the held-out loss falls. Returns how it went, the loss, whether it is kept."""
        settings, began = self.settings, time.perf_counter()
        start = {p: Starting(places[p], _codes(layer)) for p, layer in layers.items() if p in places}
        found = adaround(
            call, layers, start, before, learning, settings, self.device, self.dtype, self._seed(unit), tell
        )
        self.meter.time("adaround", began)
        kept = {path: _codes(layers[path]) for path in found}
        for path, codes in found.items():
            layers[path].codes = codes.cpu()
        after = measure(call, held, self.device, settings.batch)
        if after < GAIN * before:
            return f"reconstructed: loss {before:.3g} -> {after:.3g}", after, True
        for path, codes in kept.items():
            layers[path].codes = codes
        why = "no gain" if after <= before * 1.5 else "diverged"
        return f"error feedback kept, reconstruction {why}: loss {before:.3g} -> {after:.3g}", before, False

    def _seed(self, unit: Unit) -> int:
        return self.seed + zlib.crc32(unit.path.encode())


def _codes(layer: Layer) -> Tensor:
    assert layer.codes is not None
    return layer.codes
