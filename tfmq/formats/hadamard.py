"""Rotation of the input channels of a Linear: spreads an outlier of one channel over many.

x W^T = (x R) (W R)^T for an orthogonal R; W R is folded into the codes (QuaRot, 2404.00456, section 4; TR-DQ,
2503.06564, for diffusion models). Three kinds, all of normalized Hadamard blocks, so that R costs a small product per
token and its inverse is its transpose:

    R = H            an outlier is spread over its own block
    R = P1 H         P1, a permutation of the channels, deals the widest ones out to the blocks first
    R = P1 H P2 H    P2 does the same with what H made of them, so that an outlier is spread over all channels

P1 and P2 are the zig-zag of DuQuant (2406.01721, section 3.2). There each H is a product of up to 256 reflections that
take the widest entry to a uniform vector; a Hadamard matrix spreads every entry evenly at once, and it need not be
stored.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..scheme import SMALLEST_GROUP

LARGEST = 256


def group_of(channels: int) -> int:
    """Block size for these input channels: the largest power of two up to 256 that divides them, or 0 under 16."""
    group = min(channels & -channels, LARGEST)
    return group if group >= SMALLEST_GROUP else 0


def rotate(x: Tensor, group: int, permutations: Tensor | None = None) -> Tensor:
    """x [..., K] float -> x R [..., K], same dtype; of an input or of a weight [N, K].

    group divides K; 0: no rotation. permutations: integers [1, K] or [2, K], those before each pass; None for H alone.
    """
    if not group:
        return x
    if permutations is None:
        return _blocks(x, group)
    for permutation in permutations.to(x.device, torch.int64):
        x = _blocks(_select(x, permutation), group)
    return x


def suits_tensor_cores(x: Tensor) -> bool:
    """Whether the device multiplies x's type several times as fast as float32."""
    return x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16)


def rotate_as_means(x: Tensor, group: int, permutations: Tensor | None = None) -> tuple[Tensor, float]:
    """x [..., K] in 16 bits -> y, of its shape and type, and a factor: `rotate` gives y * factor.

    The matrices hold +-1 / group instead of +-1 / sqrt(group): powers of two, which every float type holds exactly, and
    means of entries of x, of which none is larger than the largest of x, so that float16 does not overflow. They are
    rounded once a pass, to x's type.
    """
    if permutations is None:
        return _means(x, group), group**0.5
    for permutation in permutations.to(x.device, torch.int64):
        x = _means(_select(x, permutation), group)
    return x, group ** (len(permutations) / 2)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor in float32, rounded once to x's type, in one pass."""
    if x.requires_grad:
        return (x * factor).to(x.dtype)
    return torch.mul(x, factor, out=torch.empty_like(x))


@lru_cache(maxsize=64)
def constant(value: float, count: int, device: torch.device) -> Tensor:
    """float32 [count], all of them `value`; the same tensor again for the same arguments."""
    with torch.inference_mode(False):
        return torch.full((count,), value, dtype=torch.float32, device=device)


def unrotate(x: Tensor, group: int, permutations: Tensor | None = None) -> Tensor:
    """The inverse of `rotate`."""
    if not group:
        return x
    if permutations is None:
        return _blocks(x, group)  # H is symmetric
    for permutation in permutations.to(x.device, torch.int64).flip(0):
        x = _blocks(x, group).index_select(-1, permutation.argsort())
    return x


def _select(x: Tensor, permutation: Tensor) -> Tensor:
    if x.device.type == "cpu" and x.dtype != torch.float32:  # of which index_select takes twice as long as gather
        return x.gather(-1, permutation.expand(x.shape))
    return x.index_select(-1, permutation)


def _blocks(x: Tensor, group: int) -> Tensor:
    blocks = x.reshape(*x.shape[:-1], -1, group)
    return (blocks @ _hadamard(group, x.device, x.dtype)).reshape(x.shape)


def _means(x: Tensor, group: int) -> Tensor:
    blocks = x.reshape(*x.shape[:-1], -1, group)
    return (blocks @ _averages(group, x.device, x.dtype)).reshape(x.shape)


@lru_cache(maxsize=64)
def _averages(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return (_signs(size) / size).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def _hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # kept for every later caller, inside of inference mode or not
        return (_signs(size) / size**0.5).to(device=device, dtype=dtype)


def _signs(size: int) -> Tensor:
    """Hadamard matrix of +-1, float64, by Sylvester's construction."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
