"""Temporal features without the network: the Temporal Information Block (TIB) alone, in float, over any timesteps.

For the models whose TIB sees t and nothing else (SD1.5, Qwen-Image, AuraFlow, Lumina 2, Z-Image, Wan 2.1, PixArt-Sigma)
it is a small graph: an embedding of t, an embedder h of Linear layers with SiLU between them, and one Linear g_i per
output behind h (TFMQ-DM, CVPR 2024, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import TfmqError
from .tib import Tib, find_tib

EMBEDDING = ""  # the source of the first layer
MAX_PERIOD = 10000.0
# Architectures whose network hands the embedder's output to the projections alone. (Wan and PixArt modulate their heads
# by it, too.)
_FOR_PROJECTIONS_ALONE = ("unet", "qwen_image", "auraflow", "lumina2")


@dataclass(frozen=True)
class TemporalLayer:
    """One Linear. weight float32 [N, K]; bias float32 [N] or None; source: path of the layer whose output it reads, or
    EMBEDDING; silu: whether a SiLU stands between the two."""

    weight: Tensor
    bias: Tensor | None
    source: str
    silu: bool


@dataclass(frozen=True)
class TemporalGraph:
    """layers: path -> layer, every one behind its source. embed: t [T] -> float32 [T, K] of the first layer."""

    layers: dict[str, TemporalLayer]
    embed: Callable[[Tensor], Tensor]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Paths of the layers that no other layer reads: what the blocks are handed."""
        read = {layer.source for layer in self.layers.values()}
        return tuple(path for path in self.layers if path not in read)

    @property
    def embedder(self) -> tuple[str, ...]:
        """Paths of the layers that other layers read."""
        outputs = self.outputs
        return tuple(path for path in self.layers if path not in outputs)

    def walk(self, embedded: Tensor, compute: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """Run the graph with `compute(path, x)` as its layers; x is the input behind the SiLU. Returns all outputs."""
        found: dict[str, Tensor] = {}
        shared: dict[tuple[str, bool], Tensor] = {}  # all projections read the same SiLU of the same feature
        for path, layer in self.layers.items():
            key = (layer.source, layer.silu)
            if key not in shared:
                x = embedded if layer.source == EMBEDDING else found[layer.source]
                shared[key] = F.silu(x) if layer.silu else x
            found[path] = compute(path, shared[key])
        return found

    def features(self, t: Tensor) -> dict[str, Tensor]:
        """t [T] -> float32 output [T, N] of every layer. Raises TfmqError for NaN or infinite features."""
        found = self.walk(self.embed(t), self._float)
        for path, feature in found.items():
            if not bool(torch.isfinite(feature).all()):
                raise TfmqError(
                    f"Temporal layer {path} gives NaN or infinite values, so nothing can be learnt from it: load an "
                    "intact copy of the model."
                )
        return found

    def inputs(self, t: Tensor) -> dict[str, Tensor]:
        """t [T] -> float32 input [T, K] of every layer, behind its SiLU."""
        found: dict[str, Tensor] = {}

        def compute(path: str, x: Tensor) -> Tensor:
            found[path] = x
            return self._float(path, x)

        self.walk(self.embed(t), compute)
        return found

    def _float(self, path: str, x: Tensor) -> Tensor:
        layer = self.layers[path]
        return F.linear(x, layer.weight, layer.bias)


def inner_layers(graph: TemporalGraph, architecture: str) -> tuple[str, ...]:
    """Paths of the layers whose output only other layers of the graph read."""
    return graph.embedder if architecture in _FOR_PROJECTIONS_ALONE else graph.embedder[:-1]


def sinusoid(t: Tensor, channels: int, max_period: float = MAX_PERIOD) -> Tensor:
    """Timestep embedding of the UNets: t [T] -> float32 [T, channels] = cos(t w_i), then sin(t w_i), with w_i =
    max_period^(-i / half), half = channels // 2 (Ho et al. 2020, with cosines first); an odd channel is zero."""
    half = channels // 2
    w = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(max_period) / half))
    angle = t.float().unsqueeze(1) * w
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, channels % 2))


def temporal_graph(
    network: nn.Module,
    embed: Callable[[Tensor], Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    tib: Tib | None = None,
) -> TemporalGraph:
    """The graph of a network's TIB.

    embed: the embedding of t; may be left out for UNets. weights: parameter name inside the network -> value that takes
    the place of the network's own (a LoRA merged, say). tib: where it was found already. Weights are copied to float32
    on their device.
    Raises TfmqError where there is no TIB, where it depends on more than t, or is not built of Linear layers and SiLUs.
    """
    tib = tib or find_tib(network)
    if not tib.layers:
        raise TfmqError(
            f"No Temporal Information Block is known in a {type(network).__name__}: set temporal to float in TFMQ "
            "Quantize (TFMQ Temporal Report cannot show this model)."
        )
    other = sorted(set(tib.layers.values()) - {"t"})
    if other:
        raise TfmqError(
            f"The temporal features of this {tib.architecture} model depend on more than the timestep "
            f"({', '.join(other)}), so they cannot be learnt over all timesteps: use TFMQ Temporal Cache for it."
        )
    paths = list(tib.layers)
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(path.rpartition(".")[0], []).append(path)
    embedder = next((group for group in groups.values() if len(group) > 1), None)
    if embedder is None:
        raise TfmqError(f"The {tib.architecture} model has no embedder of t that is known: set temporal to float.")
    layers: dict[str, TemporalLayer] = {}
    for path in [*embedder, *(p for p in paths if p not in embedder)]:
        if path == embedder[0]:
            source, silu = EMBEDDING, False
        elif path in embedder:
            source, silu = embedder[embedder.index(path) - 1], True
        else:
            source, silu = embedder[-1], _behind_silu(network, path)
        weight, bias = _parameter(network, f"{path}.weight", weights), _parameter(network, f"{path}.bias", weights)
        if weight is None or weight.dim() != 2:
            raise TfmqError(f"Temporal layer {path} is no Linear layer: set temporal to float.")
        layers[path] = TemporalLayer(weight, bias, source, silu)
    if embed is None:
        if tib.architecture != "unet":
            raise ValueError(f"give `embed`: the embedding of t of a {tib.architecture} model is not known here")
        channels = layers[embedder[0]].weight.shape[1]
        embed = lambda t: sinusoid(t, channels)  # noqa: E731
    return TemporalGraph(layers, embed)


def _behind_silu(network: nn.Module, path: str) -> bool:
    """Whether the parent applies a SiLU before the layer: all known parents that hold one do."""
    parent = network.get_submodule(path.rpartition(".")[0])
    return any(isinstance(child, nn.SiLU) for child in parent.children())


def _parameter(network: nn.Module, name: str, weights: Mapping[str, Tensor] | None) -> Tensor | None:
    if weights is not None and name in weights:
        value = weights[name]
    else:
        path, _, last = name.rpartition(".")
        value = getattr(network.get_submodule(path), last)
    if value is None:
        return None
    # A quantized weight of the host knows how to become float; clone(): the result must be no inference tensor.
    value = value.detach()
    value = value.dequantize() if hasattr(value, "_layout_cls") else value
    with torch.inference_mode(False):
        return value.to(torch.float32, copy=True)
