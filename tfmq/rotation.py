"""Hadamard rotation of the input channels of a Linear: spreads an outlier of one channel over its whole block.

x W^T = (x R) (W R)^T for an orthogonal R. R is block-diagonal with normalized Hadamard blocks, so that it costs a small
product per token and its inverse is its transpose; W R is folded into the codes (QuaRot, 2404.00456, section 4; TR-DQ,
2503.06564, for diffusion models).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LARGEST, SMALLEST = 256, 16


def group_of(channels: int) -> int:
    """Block size for so many input channels: the largest power of two up to 256 that divides them, or 0 under 16."""
    group = min(channels & -channels, LARGEST)
    return group if group >= SMALLEST else 0


def rotate(x: Tensor, group: int) -> Tensor:
    """x [..., K] float -> x R [..., K], same dtype; group divides K. R is symmetric: twice is the identity."""
    blocks = x.reshape(*x.shape[:-1], -1, group)
    return (blocks @ _hadamard(group, x.device, x.dtype)).reshape(x.shape)


@lru_cache(maxsize=64)
def _hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # kept for every later caller, inside of inference mode or not
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < size:  # Sylvester's construction
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (matrix / size**0.5).to(device=device, dtype=dtype)
