"""The Temporal Information Block of a MODEL as a graph of its own, with the LoRAs that are on the MODEL."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from torch import Tensor, device, nn

from ...errors import TfmqError
from ...temporal.features import TemporalGraph, temporal_graph
from ...temporal.tib import find_tib
from ..model import PREFIX, float_weight


def graph_of(patcher: ModelPatcher, network: nn.Module, where: device) -> TemporalGraph:
    """The TIB of a float MODEL on the device `where`, patches merged.

    Raises TfmqError for a MODEL whose temporal features do not depend on t alone or whose embedding is not known.
    """
    tib = find_tib(network)
    weights: dict[str, Tensor] = {}
    if not set(tib.layers.values()) - {"t"}:
        if tib.layers and tib.architecture != "unet":
            raise TfmqError(
                f"How a {tib.architecture} model embeds the timestep is not known here, so its temporal path cannot be "
                "quantized: leave temporal at float, and use TFMQ Temporal Cache for it."
            )
        for path in tib.layers:
            for name in ("weight", "bias"):
                if getattr(network.get_submodule(path), name, None) is not None:
                    weights[f"{path}.{name}"] = float_weight(patcher, f"{PREFIX}{path}.{name}").to(where)
    return temporal_graph(network, weights=weights)
