"""The time model of a layer on a GPU: does an int8 product save more time than the passes around it take?

Per output row, a float16 layer takes 2 N K operations, an integer one as many of a quicker kind and passes over memory
that the float one has not. Both grow with the rows, so that only the layer and the GPU decide.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

import torch

from ..geometry import Geometry


class Rates(NamedTuple):
    """balance: float16 operations (float32 sums) in the time of a byte from memory; gain: int8 operations in that of a
    float16 one. Both by the makers' data sheets."""

    balance: float
    gain: float


class Passes(NamedTuple):
    """Bytes of memory traffic beyond that of a float16 layer: per input channel and per output channel of a row, and
    per gathered entry where a convolution has to gather its patches (0: it does not)."""

    read: float
    written: float
    gathered: float = 0.0


# A card of each kind with which an integer product pays little; by data sheets, not all of them. GeForce cards add
# float16 products up in float32 at half their rate, so that int8 is four times as fast there, twice elsewhere.
GEFORCE = {7: Rates(90.0, 4.0), 8: Rates(164.0, 4.0)}  # RTX 2080: 40.3e12 / 448e9; RTX 4090: 165.2e12 / 1008e9
OTHERS = {7: Rates(203.0, 2.0), 8: Rates(419.0, 2.0)}  # T4: 65e12 / 320e9; L40S: 362e12 / 864e9

# Cards of capability 7.5 with tensor cores; the GTX 16 series and its relatives have none.
WITH_TENSOR_CORES = re.compile(r"RTX|\bT4G?\b|\bT10\b|\bT40\b|\bCMP [45]0HX")


@lru_cache
def no_int8(device: torch.device) -> str | None:
    """Why this GPU has no quick int8 product, or None."""
    if device.type == "cpu":
        return "only on CUDA GPUs"
    if device.type != "cuda":
        return f"no integer matrix product on {device.type}"
    if torch.version.hip is not None:
        return "not tried on AMD GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 5):
        return "the GPU has no int8 tensor cores"
    if capability == (7, 5) and not WITH_TENSOR_CORES.search(torch.cuda.get_device_name(device)):
        return "the GPU has no tensor cores"
    return None


@lru_cache
def rates(device: torch.device) -> Rates:
    """Of a CUDA device for which `no_int8` gives None."""
    kind = GEFORCE if "GeForce" in torch.cuda.get_device_name(device) else OTHERS
    return kind[min(torch.cuda.get_device_capability(device)[0], 8)]


def slower(device: torch.device, geometry: Geometry, passes: Passes) -> str | None:
    """Why an integer layer would take longer than a float16 one here, or None."""
    at = rates(device)
    n, c, *kernel = geometry.shape
    taps = kernel[0] * kernel[1] if kernel else 1
    # A row of a strided convolution stands for this number of pixels of the input.
    pixels = geometry.stride[0] * geometry.stride[1] if geometry.is_conv else 1
    saved = 2.0 * n * c * taps * (1.0 - 1.0 / at.gain)
    gathered = passes.gathered * c * taps if gathers(geometry) else 0.0
    spent = at.balance * (passes.read * c * pixels + passes.written * n + gathered)
    return None if saved > spent else "for its few channels the passes around an int8 product take longer than it saves"


def gathers(geometry: Geometry) -> bool:
    """Whether a convolution is no plain product of its image's pixels."""
    return geometry.is_conv and (geometry.shape[2:] != (1, 1) or geometry.stride != (1, 1) or any(geometry.padding))
