"""Normal equations of the layers at which passes wait, and error feedback on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import int4
from .gptq4 import Gram, feedback, input_columns
from .layer import Layer
from .meter import Meter
from .passes import Pass

POSITIONS = 16384  # of the normal equations of one layer, or four times its columns if that is more


class Fed(NamedTuple):
    """codes, grid: of a layer. place: of its weights on the grid before they were rounded. note: how it went."""

    codes: Tensor
    grid: int4.Grid
    place: Tensor
    note: str


class Equations:
    """weight: path -> float weight. dtype: of the products."""

    def __init__(self, weight: Callable[[str], Tensor], dtype: torch.dtype, seed: int, meter: Meter) -> None:
        self.weight, self.dtype, self.seed, self.meter = weight, dtype, seed, meter
        self.grams: dict[tuple[str, bool], Gram] = {}  # by layer, and whether they judge or teach
        self.current: tuple[str, Tensor] | None = None  # a layer and its weight's columns

    def add(self, path: str, layer: Layer, quantized: Tensor, one: Pass, alike: int) -> None:
        """Take the input of a layer into its normal equations, or into those that judge. alike: passes that do."""
        if layer.geometry.groups != 1 or (one.held and one.twin is None):
            return
        columns = input_columns(quantized, _window(layer))
        key = (path, one.held)
        if key not in self.grams:
            self.grams[key] = Gram(columns.shape[1], columns.device)
            self.meter.count(self.grams[key].nbytes)
        gram = self.grams[key]
        most = -(-max(POSITIONS, 4 * columns.shape[1]) // max(1, alike))
        one.chosen = None
        if columns.shape[0] > most:
            generator = torch.Generator().manual_seed(self.seed + gram.positions)
            one.chosen = torch.randperm(columns.shape[0], generator=generator)[:most].to(columns.device)
            columns = columns[one.chosen]
        gram.add(columns, self.dtype)
        one.columns = columns if one.twin is not None else None

    def add_pull(self, path: str, layer: Layer, x: Tensor, twin: Pass) -> None:
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

    def feed_back(self, path: str, layer: Layer) -> Fed:
        """Round a layer on what it has been given; that is forgotten."""
        gram = self.grams.pop((path, False), None)
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
        self.meter.count(-sum(one.nbytes for one in {id(g): g for g in (gram, judge) if g is not None}.values()))
        self.current = None
        return Fed(codes, grid, place, note)


def _window(layer: Layer) -> tuple[tuple[int, ...], ...] | None:
    g = layer.geometry
    return (g.shape[2:], g.stride, g.padding, g.dilation) if g.is_conv else None
