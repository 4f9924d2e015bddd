"""What fine-tuning trains: scales of activations and of weights, and biases."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..state import Rounded
from .layer import Layer

SMALLEST = 1e-3  # root mean square of a bias, from which its rate is taken


@dataclass(eq=False)
class Variable:
    """Something that is trained: `leaf`, which lies at 0 in the beginning, and where its value goes."""

    leaf: Tensor
    rate: float
    holder: dict[str, Any]
    name: str
    value: Callable[[Tensor], Tensor]


class Variables:
    """all: by the path of a layer and the name of what is trained there. owned: unit -> those inside of it."""

    def __init__(
        self, modules: dict[str, nn.Module], layers: dict[str, Layer], start: dict[str, Rounded], units: Collection[str]
    ) -> None:
        self.modules, self.layers, self.start, self.units = modules, layers, start, units
        self.all: dict[tuple[str, str], Variable] = {}
        self.owned: dict[str, list[Variable]] = {}

    def make(
        self, temporal: Collection[str], device: torch.device, *, activation_rate: float, weight_rate: float,
        bias_rate: float,
    ) -> None:  # fmt: skip
        """Variables of the layers, and of the biases of the modules `temporal`."""
        for path in self.start:
            layer = self.layers[path]
            if layer.act_scale is not None:
                scale = layer.act_scale.to(device)
                self._add(path, "act_scale", torch.zeros_like(scale), activation_rate, partial(_scaled, scale))
            one = torch.ones(layer.geometry.shape[0], device=device)
            self._add(path, "gain", torch.zeros_like(one), weight_rate, partial(_scaled, one))
            if layer.bias is not None:
                self._add_bias(path, layer.bias.to(device), bias_rate)
        for path in temporal:
            bias = self.modules[path]._parameters.get("bias")
            if bias is not None:
                self._add_bias(path, bias, bias_rate)

    def _add_bias(self, path: str, bias: Tensor, rate: float) -> None:
        size = bias.float().square().mean().sqrt().clamp_min(SMALLEST)
        start = torch.zeros_like(bias, dtype=torch.float32)
        self._add(path, "bias", start, rate, partial(_shifted, bias, size))

    def _add(self, path: str, name: str, leaf: Tensor, rate: float, value: Callable[[Tensor], Tensor]) -> None:
        holder: dict[str, Any] = vars(self.layers[path]) if path in self.layers else self.modules[path]._parameters
        one = Variable(leaf.detach().requires_grad_(), rate, holder, name, value)
        self.all[path, name] = one
        for unit in self.units:
            if path == unit or path.startswith(f"{unit}."):
                self.owned.setdefault(unit, []).append(one)

    def put(self) -> None:
        """Every value to where it goes."""
        for one in self.all.values():
            one.holder[one.name] = one.value(one.leaf)

    def result(self, note: str) -> tuple[dict[str, Rounded], dict[str, Tensor]]:
        """Roundings of the layers, and what is added to the biases. note: goes behind those of the roundings."""
        found, biases = {}, {}
        for path, rounded in self.start.items():
            changed: dict[str, Any] = {"note": f"{rounded.note}; {note}"}
            if (path, "act_scale") in self.all:
                one = self.all[path, "act_scale"]
                zero = self.layers[path].act_zero_point
                assert zero is not None
                changed |= {"act_scale": one.value(one.leaf).cpu(), "act_zero_point": zero.cpu()}
            gain = self.all[path, "gain"].leaf.exp().cpu()
            changed["scale"] = rounded.scale * gain
            found[path] = replace(rounded, **changed)
        for (path, name), one in self.all.items():
            if name == "bias":
                before = one.value(torch.zeros_like(one.leaf)).float()
                biases[path] = (one.value(one.leaf).float() - before).cpu()
        return found, biases


def _scaled(start: Tensor, move: Tensor) -> Tensor:
    return start * move.exp()


def _shifted(start: Tensor, size: Tensor, move: Tensor) -> Tensor:
    return (start.float() + move * size).to(start.dtype)
