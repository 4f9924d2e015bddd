"""A small Temporal Information Block with random weights, for tests that need no host."""

import torch

from tfmq.temporal.features import EMBEDDING, TemporalGraph, TemporalLayer, sinusoid
from tfmq.temporal.fsc import FiniteSet
from tfmq.timeline import TimeAxis

AXIS = TimeAxis(0.0, 199.0)


def small_graph(width: int = 48, outputs: int = 3, seed: int = 0) -> TemporalGraph:
    noise = torch.Generator().manual_seed(seed)

    def layer(n: int, k: int, source: str, silu: bool) -> TemporalLayer:
        weight = torch.randn(n, k, generator=noise) * (2 / k) ** 0.5
        return TemporalLayer(weight, torch.randn(n, generator=noise) * 0.1, source, silu)

    layers = {
        "time_embed.0": layer(width, 32, EMBEDDING, False),
        "time_embed.2": layer(width, width, "time_embed.0", True),
    }
    for i in range(outputs):
        layers[f"blocks.{i}.emb"] = layer(24, width, "time_embed.2", True)
    return TemporalGraph(layers, lambda t: sinusoid(t, 32))


def small_times() -> FiniteSet:
    return FiniteSet.of(AXIS, 200)
