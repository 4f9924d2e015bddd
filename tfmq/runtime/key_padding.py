"""Attention over few keys on a CPU: torch's kernel is slow behind the last whole vector of a row of scores.

Text has 77 tokens, which is no multiple of 16; docs/decisions/keys-padded-to-whole-vectors.md has the times.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

VECTOR = 16
MOST_KEYS = 256
# At fewer the mask costs more than it saves.
LEAST_QUERIES = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 1024}


def whole_vectors(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """k and v [B, ..., L, D], and a mask [1, L'] to add to the scores, that give what k and v alone do.

    q: [B, ..., N, D]. L' is the next multiple of 16; the keys beyond L get no weight. None where it would be no faster.
    """
    keys = k.shape[-2]
    more = -keys % VECTOR
    if not more or keys >= MOST_KEYS or k.device.type != "cpu":
        return None
    if q.shape[-2] < LEAST_QUERIES.get(k.dtype, q.shape[-2] + 1):
        return None
    if not q.shape[0] == k.shape[0] == v.shape[0] or v.shape[-2] != keys:
        return None
    mask = torch.zeros(1, keys + more, dtype=k.dtype)
    mask[:, keys:] = -torch.inf
    return F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more)), mask
