"""int8 x int8 -> int32, exact on every device that has it."""

from __future__ import annotations

import torch
from torch import Tensor

from .trial import once

MIN_ROWS = 17  # cuBLASLt's int8 product wants more than 16 rows, and inner and outer sizes divisible by 8
MULTIPLE = 8
CPU = torch.device("cpu")


def int8_product(q: Tensor, codes: Tensor) -> Tensor:
    """q int8 [M, K], codes int8 [N, K] -> int32 [M, N] = q codes^T. K, N multiples of MULTIPLE, M at least MIN_ROWS.

    On a CPU without VNNI instructions `torch._int_mm` adds pairs of products in int16, which saturates, and says
    nothing. Half a code keeps such a pair of an unsigned and a signed operand in range, 2 * 255 * 64 < 2^15: so there
    the weight goes in as its upper seven bits and its lowest one.
    Measured against float32 products in exact chunks: docs/decisions/int8-product-without-vnni.md.
    """
    if q.device.type == "cpu" and not _adds_exactly():
        upper = torch._int_mm(q, (codes >> 1).t())
        return upper.mul_(2).add_(torch._int_mm(q, (codes & 1).t()))
    return torch._int_mm(q, codes.t())


def _adds_exactly() -> bool:
    """Whether `torch._int_mm` is right on this CPU where no pair of products fits in 16 bits; False where nothing can
    be tried."""
    return bool(once("int8_product", _try, CPU))


def _try() -> bool:
    k = 64
    with torch.inference_mode():
        q, codes = torch.full((MIN_ROWS, k), 127, dtype=torch.int8), torch.full((16, k), 127, dtype=torch.int8)
        codes[::2] = -127
        wanted = (127 * k * codes[:, 0].int()).expand(MIN_ROWS, -1)
        return torch.equal(torch._int_mm(q, codes.t()), wanted)
