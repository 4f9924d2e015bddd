"""Weights in 4 bits: one scale per output channel, and per group of input columns a whole-numbered factor and zero.

    weight[n, k] = scale[n] * factor[n, g] * (code[n, k] - zero[n, g]),   code 0 .. 15

The product factor * (code - zero) fits int8, so that a kernel for 8-bit weights with one scale per channel runs it
unchanged once the codes are unpacked (two-level scales as in QServe, 2405.04532, section 4.1, here with a searched
range). Columns are the weight's entries in the order [kh, kw, C], as a kernel over channels-last images reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..scheme import SMALLEST_GROUP

TOP = 15  # largest code
LARGEST_FACTOR = 15  # 15 * 8 fits int8
GROUPS = (32, 64, 128)
# What the range search tries: the channel's scale below the one that covers everything, then each group's step below
# its own range.
CHANNEL_SHRINK = (1.0, 0.8)
GROUP_SHRINK = (1.0, 0.92, 0.84, 0.76, 0.68)
CHUNKS = {"cpu": 1 << 17}  # entries searched at a time: what a core's cache holds
CHUNK = 1 << 22  # on other devices


class Grid(NamedTuple):
    """scale float32 [N]; factor, zero uint8 [N, K' / group]; group: columns that share a factor."""

    scale: Tensor
    factor: Tensor
    zero: Tensor
    group: int


@dataclass(frozen=True)
class Packed:
    """A packed weight. codes: uint8 [N, K' / 2], byte j holds code 2 j in its low half and 2 j + 1 in its high half.
    shape: of the float weight, [N, K] or [N, C, kh, kw]."""

    codes: Tensor
    grid: Grid
    shape: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def int8(self) -> Tensor:
        """factor * (code - zero) as int8, in the weight's shape; times `grid.scale` it is the weight."""
        n, columns = self.codes.shape[0], self.codes.shape[1] * 2
        codes = unpack(self.codes).view(torch.int8).view(n, columns // self.grid.group, self.grid.group)
        codes.sub_(self.grid.zero.view(torch.int8).unsqueeze(2)).mul_(self.grid.factor.view(torch.int8).unsqueeze(2))
        return from_columns(codes.view(n, columns), self.shape)

    def dequantize(self) -> Tensor:
        """The weight, float32 of `shape`."""
        return from_columns(values(unpack(self.codes), self.grid), self.shape)


def group_for(channels: int, wanted: int) -> int:
    """The largest power of two up to `wanted` that divides the input channels, or 0 where that is under 16."""
    group = min(channels & -channels, wanted)
    return group if group >= SMALLEST_GROUP else 0


def to_columns(weight: Tensor) -> Tensor:
    """[N, K] or [N, C, kh, kw] -> [N, K'], columns in the order [kh, kw, C]."""
    if weight.dim() == 2:
        return weight
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def from_columns(columns: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `to_columns`; a view, in channels-last order for a convolution."""
    if len(shape) == 2:
        return columns
    n, c, kh, kw = shape
    return columns.view(n, kh, kw, c).permute(0, 3, 1, 2)


def search_grid(columns: Tensor, group: int, importance: Tensor | None = None, symmetric: bool = False) -> Grid:
    """Scales, factors and zeros with the least squared error of nearest rounding that the search finds.

    columns float [N, K'], group divides K'; importance [K']: weight of each column's error, such as the mean square of
    what it is multiplied by. symmetric: every zero is 8.
    Raises ValueError if the group does not divide the columns.
    """
    k = columns.shape[1]
    if group < 2 or k % group:
        raise ValueError(f"groups of {group} do not divide {k} columns")
    rows = max(1, CHUNKS.get(columns.device.type, CHUNK) // k)
    found = [_search(part.float(), group, importance, symmetric) for part in columns.detach().split(rows)]
    scale, factor, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Grid(scale, factor.to(torch.uint8), zero.to(torch.uint8), group)


def step(grid: Grid) -> Tensor:
    """Distance of two grid points, float32 [N, K']."""
    return (grid.scale.unsqueeze(1) * grid.factor.float()).repeat_interleave(grid.group, 1)


def place(columns: Tensor, grid: Grid) -> Tensor:
    """Where each entry lies on its grid, float32 [N, K'], neither rounded nor clipped."""
    n = columns.shape[0]
    grouped = columns.float().reshape(n, -1, grid.group)
    size = (grid.scale.unsqueeze(1) * grid.factor.float()).unsqueeze(2)
    return (grouped / size + grid.zero.float().unsqueeze(2)).view(n, -1)


def nearest(columns: Tensor, grid: Grid) -> Tensor:
    """Codes uint8 [N, K'] of the nearest grid points."""
    return place(columns, grid).round_().clamp_(0, TOP).to(torch.uint8)


def values(codes: Tensor, grid: Grid) -> Tensor:
    """Codes [N, K'] -> float32 [N, K']."""
    n = codes.shape[0]
    grouped = codes.reshape(n, -1, grid.group).float() - grid.zero.float().unsqueeze(2)
    return (grouped * (grid.scale.unsqueeze(1) * grid.factor.float()).unsqueeze(2)).view(n, -1)


def pack(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K'] -> [N, K' / 2]. Raises ValueError for a code over 15 or an odd number of columns."""
    if codes.shape[1] % 2:
        raise ValueError(f"an odd number of columns ({codes.shape[1]}) does not pack")
    if codes.numel() and int(codes.max()) > TOP:
        raise ValueError(f"a 4-bit code is at most {TOP}, got {int(codes.max())}")
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).contiguous()


def unpack(packed: Tensor) -> Tensor:
    """[N, K' / 2] -> codes uint8 [N, K'], a new tensor."""
    wide = packed.contiguous().to(torch.int16)  # only bytes of one row that lie together make a pair
    return ((wide << 4).bitwise_or_(wide)).bitwise_and_(0x0F0F).view(torch.uint8)  # a little-endian pair of bytes


def _search(w: Tensor, group: int, importance: Tensor | None, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    n = w.shape[0]
    w = w.view(n, -1, group)
    weight = None if importance is None else importance.to(w).view(1, -1, group)
    low, high = w.amin(2).clamp_max(0), w.amax(2).clamp_min(0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    span = (high - low) / TOP
    center = (low + high) / 2
    reach = LARGEST_FACTOR if symmetric else _largest_factor((-low / span.clamp_min(1e-30)).round())
    cover = (span / reach).amax(1).clamp_min(torch.finfo(torch.float32).tiny * 256)  # finest scale that reaches all

    best = torch.full((n,), float("inf"), device=w.device)
    out_scale, out_factor, out_zero = cover, torch.ones_like(span), torch.zeros_like(span)
    for channel_shrink in CHANNEL_SHRINK:
        scale = cover * channel_shrink
        error = torch.full_like(span, float("inf"))
        factor, zero = torch.ones_like(span), torch.zeros_like(span)
        seen: list[tuple[Tensor, Tensor]] = []
        for group_shrink in GROUP_SHRINK:
            wanted = (span * group_shrink / scale.unsqueeze(1)).round_().clamp_(1, LARGEST_FACTOR)
            size = scale.unsqueeze(1) * wanted
            middle = torch.full_like(size, 8.0) if symmetric else (TOP / 2 - center / size)
            for z in (middle,) if symmetric else (middle.floor(), middle.ceil()):
                z = z.clamp(0, TOP)
                trial = torch.minimum(wanted, _largest_factor(z))
                if any(torch.equal(trial, f) and torch.equal(z, o) for f, o in seen):
                    continue
                seen.append((trial, z))
                found = _error(w, scale.unsqueeze(1) * trial, z, weight)
                better = found < error
                error = torch.where(better, found, error)
                factor, zero = torch.where(better, trial, factor), torch.where(better, z, zero)
        total = error.sum(1)
        better = total < best
        best = torch.where(better, total, best)
        out_scale = torch.where(better, scale, out_scale)
        pick = better.unsqueeze(1)
        out_factor, out_zero = torch.where(pick, factor, out_factor), torch.where(pick, zero, out_zero)
    return out_scale, out_factor, out_zero


def _largest_factor(zero: Tensor) -> Tensor:
    """The largest factor with which every code stays within -127 .. 127."""
    return (127 / torch.maximum(zero, TOP - zero)).floor_().clamp_(1, LARGEST_FACTOR)


def _error(w: Tensor, size: Tensor, zero: Tensor, weight: Tensor | None) -> Tensor:
    """Squared error of nearest rounding per group: w [N, G, g], size and zero [N, G] -> [N, G]."""
    size, zero = size.unsqueeze(2), zero.unsqueeze(2)
    rounded = (w / size).round_()
    rounded = torch.minimum(torch.maximum(rounded, -zero), TOP - zero)
    error = rounded.mul_(size).sub_(w).square_()
    return (error if weight is None else error.mul_(weight)).sum(2)
