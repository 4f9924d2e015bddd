"""What is rounded so far, in memory, on disk, and in the progress that is told."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..formats import int4
from ..state import Rounded
from .checkpoint import read_unit, write_unit
from .layer import Layer, grid_to
from .progress import Countdown
from .units import Unit


class Finished:
    """rounded: path of a layer -> rounding. losses: of the units that have learnt."""

    def __init__(
        self, units: dict[str, Unit], layers: dict[str, Layer], folder: Path | None, progress: Countdown
    ) -> None:
        self.units, self.layers, self.folder, self.progress = units, layers, folder, progress
        self.unit_of = {path: unit.path for unit in units.values() for path in unit.layers}
        self.rounded: dict[str, Rounded] = {}
        self.losses: dict[str, tuple[float, float]] = {}

    @property
    def complete(self) -> bool:
        return len(self.rounded) == len(self.unit_of)

    def has(self, unit: str) -> bool:
        return all(path in self.rounded for path in self.units[unit].layers)

    def keep(self, path: str, codes: Tensor, grid: int4.Grid, note: str) -> None:
        layer = self.layers[path]
        layer.codes, layer.grid = codes.cpu(), grid_to(grid, "cpu")
        scale = zero = None
        if layer.ranges_tuned and layer.act_scale is not None and layer.act_zero_point is not None:
            scale, zero = layer.act_scale.cpu(), layer.act_zero_point.cpu()
        self.rounded[path] = Rounded(layer.codes, *layer.grid, scale, zero, note)

    def tell(self, path: str) -> None:
        """A layer has been kept: write its unit if that was the last one of it."""
        unit = self.units[self.unit_of[path]]
        if self.has(unit.path) and self.folder is not None:
            write_unit(self.folder, unit, {p: self.rounded[p] for p in unit.layers}, self.losses.get(unit.path))
        self.progress.finish(unit.path, sum(p in self.rounded for p in unit.layers) / len(unit.layers))

    def resume(self, device: torch.device) -> None:
        """Take over the units that an earlier run has written."""
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
                    layer.act_scale = rounded.act_scale.to(device)
                    layer.ranges_tuned = True
                layer.codes, layer.grid = rounded.codes, rounded.grid
                self.rounded[path] = rounded
            if loss is not None:
                self.losses[unit.path] = loss
            self.progress.found(unit.path)
