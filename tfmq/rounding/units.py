"""The units of reconstruction, found in the structure of a network: no architecture is listed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class Unit:
    """path: of the module whose output is reconstructed. layers: paths of its layers, itself for a single layer."""

    path: str
    layers: tuple[str, ...]


def find_units(network: nn.Module, layers: Collection[str]) -> list[Unit]:
    """The deepest modules that are children of a ModuleList, Sequential or ModuleDict and hold two or more of
    `layers` (a ResBlock, a transformer block); every other layer is a unit of its own.

    In the order of `network.named_modules()`, which need not be that of execution.
    """
    modules = dict(network.named_modules())
    blocks: set[str] = set()
    for path in modules:
        parent = path.rpartition(".")[0]
        if path and isinstance(modules[parent], CONTAINERS) and len(_within(path, layers)) >= 2:
            blocks.add(path)
    deepest = {path for path in blocks if not any(other.startswith(f"{path}.") for other in blocks)}
    covered = {layer for path in deepest for layer in _within(path, layers)}
    return [
        Unit(path, _within(path, layers) if path in deepest else (path,))
        for path in modules
        if path in deepest or (path in layers and path not in covered)
    ]


def _within(path: str, layers: Collection[str]) -> tuple[str, ...]:
    return tuple(layer for layer in layers if layer.startswith(f"{path}."))
