"""Convolutions in float from integer codes, for GPUs where no integer convolution is as fast as cuDNN's in 16 bit.

The weight is turned back into floats at every call (it stays in memory as codes) and the activation is not quantized
at all, so that the result is nearer to the float layer's than an integer kernel's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry import Geometry, StaticInput
from .float_product import decode


class Prepared(NamedTuple):
    """codes int8 [N, C / groups, kh, kw], scale float32 [N]."""

    codes: Tensor
    scale: Tensor
    geometry: Geometry


def prepare(codes: Tensor, scale: Tensor, geometry: Geometry, sums: Tensor | None = None) -> Prepared:
    """sums: not used."""
    return Prepared(codes.contiguous(memory_format=torch.channels_last), scale, geometry)


def view(weight: Prepared) -> Tensor:
    """The codes that `prepare` was given, in the memory of `weight`."""
    return weight.codes


def conv2d_static(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """x float [B, C, H, W] -> [B, N, H', W'] in x's dtype; of the grid only the balance counts.

    The range of the activation, which clips what an integer kernel computes, is not applied.
    """
    g = weight.geometry
    channels = grid.inverse_balance
    if channels is not None:
        channels = channels.reshape(g.groups, 1, -1).expand(-1, g.shape[0] // g.groups, -1)
        channels = channels.reshape(g.shape[0], -1, 1, 1)
    w = decode(weight.codes, weight.scale, channels, x.dtype)
    return F.conv2d(x, w, None if bias is None else bias.to(x.dtype), g.stride, g.padding, g.dilation, g.groups)
