"""What the modules of a network do while passes run through it: they halt where there is something to decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import tree
from .adaround import Call
from .equations import Equations
from .forwards import Forwards
from .layer import Layer, Rows
from .meter import Meter
from .passes import Pass


class Hooks:
    """The passes, and the forwards that they meet. finished: tells of a unit whether there is nothing left to decide.
    changed: units that no longer compute what they did when their layers were rounded."""

    def __init__(
        self, modules: dict[str, nn.Module], layers: dict[str, Layer], finished: Callable[[str], bool],
        equations: Equations, device: torch.device, meter: Meter,
    ) -> None:  # fmt: skip
        self.modules, self.layers, self.finished, self.equations = modules, layers, finished, equations
        self.device, self.meter = device, meter
        self.passes: list[Pass] = []
        self.changed: set[str] = set()
        self._forwards = Forwards()
        # What the network's modules read while they run.
        self.now: Pass | None = None
        self.quantized, self.rows, self.dtype = False, Rows(torch.zeros(1).long(), torch.zeros(1).long()), torch.float32

    def on_layer(self, path: str) -> None:
        self._forwards.replace(self.modules[path], self._layer_forward(path, self.modules[path].forward))

    def on_unit(self, path: str) -> None:
        self._forwards.replace(self.modules[path], self._unit_forward(path, self.modules[path].forward))

    def restore(self) -> None:
        for one in self.passes:
            one.lane.close()
        self.passes.clear()
        self._forwards.restore()

    def advance(self, one: Pass) -> str | None:
        """Run a pass to its next stop, and its twin to the same place if that waits for it."""
        self.now, self.quantized, self.rows, self.dtype = one, one.quantized, one.rows, torch.float32
        try:
            place = one.lane.advance()
        finally:
            self.now, self.quantized = None, False
        if one.quantized and one.twin is not None and place is not None and one.columns is not None:
            self.advance(one.twin)
        return place

    def caller(self, unit: str) -> Call:
        """A unit on its rounded layers, outside of a pass."""
        forward = self.modules[unit].forward

        def call(args: Any, kwargs: Any, rows: Rows, dtype: torch.dtype) -> list[Tensor]:
            self.quantized, self.rows, self.dtype = True, rows, dtype
            try:
                return tree.outputs(forward(*args, **kwargs))
            finally:
                self.quantized = False

        return call

    def _layer_forward(self, path: str, original: Any) -> Any:
        layer = self.layers[path]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            one = self.now
            if not self.quantized:
                if one is not None and one.twin is not None and one.twin.lane.place == path:
                    self.equations.add_pull(path, layer, x, one.twin)
                    one.lane.stop(path)
                return original(x, *args, **kwargs)
            if layer.solved or layer.trained is not None:
                return layer.compute(x, self.rows, self.dtype)
            assert one is not None
            quantized = layer.quantized_input(x, self.rows)
            alike = sum(other.quantized and other.held == one.held for other in self.passes)
            self.equations.add(path, layer, quantized, one, alike)
            one.lane.stop(path)
            return layer.multiply(quantized).to(x.dtype)

        return forward

    def _unit_forward(self, path: str, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            one = self.now
            if one is None or one.unit is not None or path in one.passed:
                return original(*args, **kwargs)
            if self.finished(path) and not one.probing:
                return original(*args, **kwargs)
            one.passed.add(path)
            one.unit = path
            if one.quantized or one.probing:
                one.inputs = tree.map_tensors((args, kwargs), _kept)
            result = original(*args, **kwargs)
            one.outputs = [_kept(t) for t in tree.outputs(result)]
            held = tree.nbytes((one.inputs, one.outputs))
            self.meter.count(held)
            one.lane.stop(f"{path}:end")
            if one.quantized and path in self.changed:
                args, kwargs = tree.map_tensors(one.inputs, lambda t: t.to(self.device, copy=True))
                result = original(*args, **kwargs)
            one.unit, one.inputs, one.outputs = None, None, []
            self.meter.count(-held)
            return result

        return forward


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
