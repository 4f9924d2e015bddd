"""The Temporal Information Block of a MODEL as a graph of its own, with the LoRAs that are on the MODEL."""

from __future__ import annotations

from torch import Tensor, device

from ...errors import TfmqError
from ...temporal.features import TemporalGraph, temporal_graph
from ..network import Network


def graph_of(network: Network, where: device) -> TemporalGraph:
    """The TIB of a float MODEL on the device `where`, patches merged.

    Raises TfmqError for a MODEL whose temporal features do not depend on t alone or whose embedding is not known.
    """
    tib = network.tib
    weights: dict[str, Tensor] = {}
    if not set(tib.layers.values()) - {"t"}:
        if tib.layers and tib.architecture != "unet":
            raise TfmqError(
                f"How a {tib.architecture} model embeds the timestep is not known here, so its temporal path cannot be "
                "quantized: leave temporal at float, and use TFMQ Temporal Cache for it."
            )
        for path in tib.layers:
            weights[f"{path}.weight"] = network.weight(path).to(where)
            bias = network.bias(path)
            if bias is not None:
                weights[f"{path}.bias"] = bias.to(where)
    return temporal_graph(network.module, weights=weights, tib=tib)
