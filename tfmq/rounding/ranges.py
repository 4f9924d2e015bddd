"""Activation ranges tuned after the rounding of a unit: the scales of its static layers, by gradient.

LSQ (1902.08153) for the scale alone, as in Q-Diffusion's second stage: Adam at 4e-4, cosine to 0. What is learnt is the
logarithm of each scale over its start, so that one rate fits layers of any magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .adaround import Call, Draw, Group, fit
from .layer import Layer

RATE = 4e-4


def tune_ranges(
    call: Call, layers: dict[str, Layer], groups: Sequence[Group], iterations: int, batch: int,
    device: torch.device, dtype: torch.dtype, seed: int, tell: Callable[[], None],
) -> dict[str, Tensor]:  # fmt: skip
    """Path -> new scale, float32 [I] or [2, I], of every layer with a static activation; the layers stay as they are.

    Arguments as of `adaround`; the layers hold their final codes.
    """
    static = {path: layer for path, layer in layers.items() if layer.act_scale is not None}
    if not static:
        return {}
    old = {path: layer.act_scale for path, layer in static.items()}
    move = {path: torch.zeros_like(scale, requires_grad=True) for path, scale in old.items() if scale is not None}
    optimizer = torch.optim.Adam(move.values(), lr=RATE)
    draw = Draw(groups, seed)
    try:
        for layer in layers.values():
            if layer.codes is not None:
                layer.trained = layer.weight(device)
        for step in range(iterations):
            for group in optimizer.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / iterations))
            part = draw.take(batch, device)
            with torch.enable_grad():

                def scaled() -> None:
                    for path, layer in static.items():
                        scale = old[path]
                        assert scale is not None
                        layer.act_scale = scale * move[path].exp()

                optimizer.zero_grad()
                fit(call, part, dtype, scaled)
            optimizer.step()
            tell()
        return {path: (scale * move[path].detach().exp()) for path, scale in old.items() if scale is not None}
    finally:
        for path, layer in static.items():
            layer.act_scale = old[path]
        for layer in layers.values():
            layer.trained = None
