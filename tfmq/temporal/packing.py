"""Weight codes of 8 or 4 bits as bytes; at 4, two share one in the order of `formats.int4`.

Model files before version `files.PAIRS` hold the first half of the columns in the low halves of the bytes and the
second in the high ones; `from_halves` puts them in order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import int4

SHIFT = 128  # between the unsigned 8-bit codes of a grid and the signed ones that integer products take


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [N, K] in 0 .. 2^bits - 1 -> int8 [N, K] less 128 for 8 bits, uint8 [N, ceil(K / 2)] for 4.

    Raises ValueError for another width, or for a code that does not fit.
    """
    if bits == 8:
        return (codes.to(torch.int16) - SHIFT).to(torch.int8)
    _require_4(bits)
    return int4.pack(F.pad(codes, (0, codes.shape[1] % 2)))


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Packed codes -> int8 [N, columns]: codes less 128 for 8 bits (the same tensor), the codes for 4."""
    if bits == 8:
        return packed
    _require_4(bits)
    return int4.unpack(packed)[:, :columns].view(torch.int8)


def from_halves(packed: Tensor) -> Tensor:
    """Packed codes uint8 [N, ceil(K / 2)] of an old file -> as `pack` makes them."""
    return int4.pack(torch.cat([packed & 15, packed >> 4], dim=1))


def signed_zero_point(zero_point: Tensor, bits: int) -> Tensor:
    """Zero points of unsigned grids, int [N] -> int8 [N], for codes as `unpack` gives them."""
    return (zero_point - (SHIFT if bits == 8 else 0)).to(torch.int8)


def _require_4(bits: int) -> None:
    if bits != 4:
        raise ValueError(f"codes have 4 or 8 bits, not {bits}")
