"""What becomes of a model in 4 bits when its temporal path is quantized too, by each way to do it (TFMQ-DM, 2311.16503,
its ablation): the features that the path gives the blocks, and its bytes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from bench.temporal.error import outputs_of, selected_features
from tfmq.temporal.features import temporal_graph
from tfmq.temporal.fsc import FiniteSet, QuantizedTib, calibrated
from tfmq.temporal.selection import select
from tfmq.temporal.tiar import tiar
from tfmq.timeline import TimeAxis

AXIS = TimeAxis(0.0, 999.0)
BITS = 4


class Variant(NamedTuple):
    """features: path of a layer -> [1000, N], its output at every timestep. nbytes: of the path, biases included."""

    features: dict[str, Tensor]
    nbytes: int


def variants(network: nn.Module, sampled: Tensor) -> dict[str, Variant]:
    """Way -> what it gives, of a UNet in float. sampled: [S], ascending, the timesteps of a run.

    layers: as any other layers, which is what they are to block reconstruction: each rounded to keep its own output on
    the timesteps of the calibration, with one activation range; tiar: rounded by TIAR, one activation range per layer;
    tiar_fsc: and one per timestep; cache: no weights, the features in float16; selected: the best of these layer by
    layer in the bytes of tiar_fsc.
    """
    graph, times = temporal_graph(network), FiniteSet.of(AXIS)
    floats = graph.features(times.points)
    rounded = {bits: tiar(graph, times, bits).tib for bits in (8, BITS)}

    def one_range(tib: QuantizedTib) -> QuantizedTib:
        codes = {path: (layer.codes, layer.scale, layer.zero_point) for path, layer in tib.layers.items()}
        return calibrated(graph, times, BITS, codes, per_timestep=False)

    def of(tib: QuantizedTib) -> Variant:
        return Variant(outputs_of(tib.features(times.points), graph), tib.nbytes)

    tibs = {f"int{bits}": tib for bits, tib in rounded.items()}
    chosen = select(graph, times, tibs, reference=f"int{BITS}")
    rows = {path: floats[path].half() for path in graph.outputs}
    return {
        "layers": of(one_range(tiar(graph, FiniteSet(sampled), BITS).tib)),
        "tiar": of(one_range(rounded[BITS])),
        "tiar_fsc": of(rounded[BITS]),
        "cache": Variant({path: row.float() for path, row in rows.items()}, sum(row.nbytes for row in rows.values())),
        "selected": Variant(selected_features(chosen, graph, times, tibs), chosen.bytes),
    }


def float_bytes(network: nn.Module) -> int:
    """Bytes of the same path in float16."""
    layers = temporal_graph(network).layers.values()
    return 2 * sum(part.numel() for layer in layers for part in (layer.weight, layer.bias) if part is not None)
