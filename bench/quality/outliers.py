"""A function-preserving rescaling that gives a trained UNet the outlier channels of large checkpoints.

A small model is easy to quantize because no channel stands out. In a real one a few channels are 10 to 100 times wider
than the rest (SmoothQuant, 2211.10438, section 3). Here some channels of a tensor are multiplied by a factor and the
layers that read them divide by it, so that the network computes the same function with harder activations.

That is exact only where every reader is linear in the scaled tensor. What is scaled, for UNets of the SD1.5 and SDXL
family:

    gain and bias of SpatialTransformer.norm   read by proj_in (a 1x1 convolution in SD1.5)
    gain and bias of norm1                     read by attn1.to_q, to_k, to_v
    gain and bias of norm2                     read by attn2.to_q
    gain and bias of norm3                     read by ff.net.0.proj
    rows of attn1.to_v and attn2.to_v          read by to_out.0 (attention mixes tokens, never channels)
    rows of the linear half of ff.net.0.proj   read by ff.net.2 (GEGLU multiplies them by the gate)

The norms of a ResBlock stay as they are: a SiLU lies between them and their convolutions, and no rescaling commutes
with it. So do the residual streams, which norms and skips read too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SHARE = 0.03  # of the channels of a tensor
LEAST, MOST = 8.0, 64.0


def add_outliers(network: nn.Module, seed: int = 0, share: float = SHARE) -> dict[str, int]:
    """Rescale a float UNet in place; returns how many channels of each tensor (named by its writer) were scaled.

    The factors are log-uniform in LEAST .. MOST, the channels drawn without replacement, both from `seed`. At least
    one channel of a tensor is scaled. Raises ValueError for a network without a transformer of this kind.
    """
    modules = dict(network.named_modules())
    places = _places(modules)
    if not places:
        raise ValueError(
            "No SpatialTransformer to rescale: the outlier variant is made of SD1.5- or SDXL-format UNets."
        )
    generator = torch.Generator().manual_seed(seed)
    scaled = {}
    with torch.no_grad():
        for writer, channels, readers in places:
            factors = _factors(channels, share, generator)
            _write(modules[writer], factors)
            for reader in readers:
                _read(modules[reader], factors)
            scaled[writer] = int((factors != 1).sum())
    return scaled


def _places(modules: dict[str, nn.Module]) -> list[tuple[str, int, list[str]]]:
    """Writer, channels, readers; the channels are the writer's first rows."""
    places = []
    for path, module in modules.items():
        kind = type(module).__name__
        if kind == "SpatialTransformer":
            places.append((f"{path}.norm", _inputs(modules[f"{path}.proj_in"]), [f"{path}.proj_in"]))
        elif kind == "BasicTransformerBlock":
            attentions = [name for name in ("attn1", "attn2") if f"{path}.{name}.to_v" in modules]
            own = [f"{path}.attn1.to_{part}" for part in "qkv"]
            readers = {"norm1": own, "norm2": [f"{path}.attn2.to_q"], "norm3": [f"{path}.ff.net.0.proj"]}
            if getattr(module, "disable_self_attn", False):
                readers["norm1"] = own[:1]
            for norm, names in readers.items():
                if f"{path}.{norm}" in modules and names[0] in modules:
                    places.append((f"{path}.{norm}", _inputs(modules[names[0]]), names))
            for name in attentions:
                reader = f"{path}.{name}.to_out.0"
                places.append((f"{path}.{name}.to_v", _inputs(modules[reader]), [reader]))
            if type(modules[f"{path}.ff.net.0"]).__name__ == "GEGLU":
                reader = f"{path}.ff.net.2"
                places.append((f"{path}.ff.net.0.proj", _inputs(modules[reader]), [reader]))
    return places


def _factors(channels: int, share: float, generator: torch.Generator) -> Tensor:
    count = max(1, round(share * channels))
    spread = torch.rand(count, generator=generator, dtype=torch.float64) * math.log(MOST / LEAST)
    factors = torch.ones(channels, dtype=torch.float64)
    factors[torch.randperm(channels, generator=generator)[:count]] = LEAST * spread.exp()
    return factors


def _write(module: nn.Module, factors: Tensor) -> None:
    for parameter in (module.weight, module.bias):
        if parameter is not None:
            assert isinstance(parameter, Tensor)
            rows = parameter[: len(factors)]
            rows.copy_(rows.double() * factors.to(rows.device).view(-1, *[1] * (rows.dim() - 1)))


def _read(module: nn.Module, factors: Tensor) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight.copy_(weight.double() / factors.to(weight.device).view(1, -1, *[1] * (weight.dim() - 2)))


def _inputs(module: nn.Module) -> int:
    assert isinstance(module.weight, Tensor)
    return module.weight.shape[1]
