"""What the products of reconstruction are computed in: 16 bits where the processor is faster in them."""

from __future__ import annotations

import time
from functools import lru_cache

import torch

FASTER = 1.5


@lru_cache(maxsize=8)
def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where that is at least 1.5 times as fast as float32 on this device, else float32."""
    if device.type not in ("cpu", "cuda"):
        return torch.float32
    try:
        plain, short = (_seconds(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    except RuntimeError:
        return torch.float32
    return torch.bfloat16 if plain > FASTER * short else torch.float32


def _seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Of one middle-sized product, the best of three."""
    a, b = (torch.ones(size, 1024, device=device, dtype=dtype) for size in (512, 640))
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        a @ b.t()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best
