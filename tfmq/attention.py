"""Attention over few keys on a CPU: torch's kernel is slow behind the last whole vector of a row of scores.

Text has 77 tokens, which is no multiple of 16; docs/speed.md has the times.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

VECTOR = 16
# Where the mask that it takes costs less than what it saves.
MOST_KEYS, LEAST_QUERIES = 256, 256


def whole_vectors(queries: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """k and v [..., L, D], and a mask [1, L'] to add to the scores, that give what k and v alone do; None where that
    would be no faster. L' is the next multiple of 16; the keys beyond L get no weight."""
    keys = k.shape[-2]
    more = -keys % VECTOR
    if not more or keys >= MOST_KEYS or queries < LEAST_QUERIES or k.device.type != "cpu":
        return None
    mask = torch.zeros(1, keys + more, dtype=k.dtype)
    mask[:, keys:] = -torch.inf
    return F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more)), mask
