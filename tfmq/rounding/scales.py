"""Scales tuned after the rounding of a unit, by gradient: of its static activations and of its weights' channels.

LSQ (1902.08153) for the scales alone, as in Q-Diffusion's second stage: Adam at 4e-4, cosine to 0. What is learnt is
the logarithm of each scale over its start, so that one rate fits layers of any magnitude. Codes stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.affine import per_channel
from .adaround import Call, Draw, Group, fit
from .layer import Layer

RATE = 4e-4


@dataclass(frozen=True)
class Scales:
    """activation: path -> scale float32 [I] or [2, I]. weight: path -> scale float32 [N]."""

    activation: dict[str, Tensor]
    weight: dict[str, Tensor]

    @classmethod
    def of(cls, layers: dict[str, Layer]) -> Scales:
        """Those that layers have now: of static activations and of 4-bit weights."""
        return cls(
            {path: layer.act_scale for path, layer in layers.items() if layer.act_scale is not None},
            {path: layer.grid.scale for path, layer in layers.items() if layer.grid is not None},
        )

    def put(self, layers: dict[str, Layer]) -> None:
        """Into the layers."""
        for path, scale in self.activation.items():
            layers[path].act_scale = scale
        for path, scale in self.weight.items():
            grid = layers[path].grid
            assert grid is not None
            layers[path].grid = grid._replace(scale=scale.to(grid.scale.device))


def tune_scales(
    call: Call, layers: dict[str, Layer], groups: Sequence[Group], iterations: int, batch: int,
    device: torch.device, dtype: torch.dtype, seed: int, tell: Callable[[], None],
) -> Scales:  # fmt: skip
    """The tuned scales of layers that hold their final codes; the layers stay as they are. Arguments: `adaround`."""
    old = Scales.of(layers)
    weights = {path: layers[path].weight(device) for path in old.weight}
    moves = [
        {path: torch.zeros_like(scale, device=device, requires_grad=True) for path, scale in part.items()}
        for part in (old.activation, old.weight)
    ]
    optimizer = torch.optim.Adam([move for part in moves for move in part.values()], lr=RATE)
    draw = Draw(groups, seed)

    def scaled() -> None:
        for path, scale in old.activation.items():
            layers[path].act_scale = scale * moves[0][path].exp()
        for path, weight in weights.items():
            layers[path].trained = weight * per_channel(moves[1][path].exp(), weight.dim())

    try:
        for step in range(iterations):
            for group in optimizer.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / iterations))
            part = draw.take(batch, device)
            optimizer.zero_grad()
            with torch.enable_grad():
                fit(call, part, dtype, scaled)
            optimizer.step()
            tell()
        return Scales(
            {path: scale * moves[0][path].detach().exp() for path, scale in old.activation.items()},
            {path: scale * moves[1][path].detach().exp().to(scale.device) for path, scale in old.weight.items()},
        )
    finally:
        old.put(layers)
        for layer in layers.values():
            layer.trained = None
