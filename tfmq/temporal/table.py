"""A saved table of the temporal layers: what of it lies in a file, and which of its rows a timestep mixes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import TfmqError
from ..timeline import TimeAxis
from ..words import counted
from .curve import Curve

MANIFEST = "temporal_table"  # key in the manifest of a file
KEYS = "tfmq_temporal_table:"  # of the curve's tensors in a file
MEGABYTE = 1e6


@dataclass(frozen=True)
class Removed:
    """One layer whose weights are gone. shape: [N, K] of the weight; dtype: of the weight in a file."""

    shape: tuple[int, int]
    bias: bool
    dtype: str


@dataclass(frozen=True)
class TemporalTable:
    """Rides on a MODEL as an attachment. nbytes_removed: what the weights took in the memory of the float model."""

    architecture: str
    layers: dict[str, Removed]
    curve: Curve
    nbytes_removed: int

    def manifest(self) -> dict[str, Any]:
        layers = {
            path: {"shape": list(r.shape), "bias": r.bias, "dtype": r.dtype, "rows": path in self.curve.rows}
            for path, r in self.layers.items()
        }
        return {
            **self.curve.manifest(), "architecture": self.architecture, "layers": layers,
            "removed": self.nbytes_removed,
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        return {KEYS + key: value for key, value in self.curve.tensors().items()}

    @property
    def placeholders(self) -> dict[str, Tensor]:
        """Tensors of one value that have the shapes of the weights: the host tells models apart by shapes."""
        found: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            value = torch.zeros((), dtype=getattr(torch, layer.dtype))
            found[f"{path}.weight"] = value.expand(layer.shape)
            if layer.bias:
                found[f"{path}.bias"] = value.expand(layer.shape[0])
        return found


def taken_from(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> TemporalTable | None:
    """The table in a file, or None. Takes its tensors out of `tensors`. Raises TfmqError where something is missing."""
    about = manifest.get(MANIFEST)
    if about is None:
        return None
    own = {key.removeprefix(KEYS): tensors.pop(key) for key in list(tensors) if key.startswith(KEYS)}
    curve = Curve.from_tensors(about, own)
    try:
        layers = {
            path: Removed((int(x["shape"][0]), int(x["shape"][1])), bool(x["bias"]), str(x["dtype"]))
            for path, x in about["layers"].items()
        }
        table = TemporalTable(about["architecture"], layers, curve, int(about["removed"]))
        rows = curve.times.numel() if curve.coefficients is None else curve.coefficients.shape[1]
        wanted = {path: (rows, layers[path].shape[0]) for path, x in about["layers"].items() if x["rows"]}
        if {path: tuple(found.shape) for path, found in curve.rows.items()} != wanted or not table.placeholders:
            raise ValueError("other rows than stated")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise TfmqError("The temporal table in this file is damaged: get or make the file again.") from error
    return table


class Moment:
    """The mixture of saved rows that the present call of the network asks for, shared by all layers.

    index: int64 [B, n] rows to mix, or None for all r of them; weights: float32 [B, n] or [B, r]. more: whether the
    last rows are for layers that get a larger batch than others.
    """

    def __init__(self, curve: Curve) -> None:
        self.axis, self.count = curve.axis, curve.times.numel()
        self.coefficients = curve.coefficients
        self.index: Tensor | None = None
        self.weights: Tensor | None = None
        self.more = False

    def set(self, t: Tensor, more: bool = False) -> None:
        """t: float32 [B], on the device of the computation. What lies outside of the axis is taken for its end."""
        index, weights = mixture(t, self.axis, self.count)
        coefficients = self.coefficients
        if coefficients is not None:
            if coefficients.device != t.device:
                coefficients = self.coefficients = coefficients.to(t.device)
            weights = (coefficients[index] * weights.unsqueeze(-1)).sum(1)
        self.more = more
        old = self.weights
        if old is not None and old.shape == weights.shape and old.device == weights.device and not old.is_inference():
            old.copy_(weights)  # in place: a captured graph goes on reading the same memory
            if self.index is not None:
                self.index.copy_(index)
            return
        with torch.inference_mode(False), torch.no_grad():
            self.weights = weights.clone()
            self.index = index.clone() if coefficients is None else None


def mixture(t: Tensor, axis: TimeAxis, count: int) -> tuple[Tensor, Tensor]:
    """t [B] -> (int64 [B, n], float32 [B, n]): which of `count` evenly spaced rows to mix, and how (cubic Lagrange, as
    in `Curve.at`). On the device of t and without waiting for it."""
    place = axis.position(t) * (count - 1)
    near = place.round()
    place = torch.where((place - near).abs() < 1e-3, near, place)
    nodes = min(4, count)
    start = (place.floor().long() - 1).clamp(0, count - nodes)
    u = place - start
    weights = []
    for j in range(nodes):
        weight = torch.ones_like(u)
        for k in range(nodes):
            if k != j:
                weight = weight * (u - k) / (j - k)
        weights.append(weight)
    steps = torch.arange(nodes, device=t.device)
    return start.unsqueeze(1) + steps, torch.stack(weights, dim=1)


def reason(table: TemporalTable) -> str:
    """Why a layer of the table has no weights, for the summary of a MODEL."""
    return f"answered by a temporal table (worst error {table.curve.worst_error:.1e} over all timesteps)"


def describe(manifest: dict[str, Any]) -> str:
    """One line about the table in a manifest (`TemporalTable.manifest`)."""
    size, removed = manifest["bytes"], manifest["removed"]
    what = f"rank {manifest['rank']}" if manifest["rank"] else f"{manifest['points']} rows"
    text = (
        f"temporal table: {counted(len(manifest['layers']), 'layer')}, {removed / MEGABYTE:.1f} MB of weights "
        f"-> {size / MEGABYTE:.2f} MB ({manifest['kind']}, {what}); error over all t: worst "
        f"{manifest['worst_error']:.1e}, mean {manifest['mean_error']:.1e} (relative L2)"
    )
    return text if size < removed else f"{text}; not worth it here: the table is larger than the weights"
