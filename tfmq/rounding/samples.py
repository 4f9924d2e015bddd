"""The samples that rounding learns from, and the batches in which they run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TfmqError

# Rows per pass: odd numbers that no other dimension of a tensor is likely to be a multiple of.
BATCHES = (31, 17, 7, 5, 3, 2)
LEAST_ROWS = 8
HELD_OUT = 8  # one batch in this number judges and does not teach


@dataclass(frozen=True)
class Source:
    """The samples. run: makes the network compute the given rows in one pass (its result is not looked at).
    interval, branch: int64 [R]. origin: [R], rows of one number came from one picture. shape: [R], rows of one value
    can share a pass."""

    run: Callable[[list[int]], object]
    interval: Tensor
    branch: Tensor
    origin: Sequence[int]
    shape: Sequence[Hashable]


def batches(source: Source, seed: int, room: Callable[[list[int]], int]) -> list[list[int]]:
    """Batches of rows of one shape; the last ones are of pictures that no other batch has, where that is possible.

    room: how many rows there is memory for, asked with those of the most frequent shape. Raises TfmqError for too few.
    """
    generator = torch.Generator().manual_seed(seed)
    by_shape: dict[Hashable, list[int]] = {}
    for i in torch.randperm(len(source.origin), generator=generator).tolist():
        by_shape.setdefault(source.shape[i], []).append(i)
    rows = max(by_shape.values(), key=len) if by_shape else []
    if len(rows) < LEAST_ROWS:
        raise TfmqError(
            f"The calibration holds {len(rows)} samples that reconstruction can use, and it takes at least "
            f"{LEAST_ROWS}: calibrate again with more steps or prompts."
        )
    fitting = room(rows)
    total = sum(len(found) for found in by_shape.values())
    size = next(b for b in BATCHES if b <= max(2, min(fitting, total) // 8) or b == 2)
    made = []
    for found in by_shape.values():
        share = min(len(found), fitting * len(found) // total)
        found = sorted(found[:share], key=lambda i: source.origin[i])
        made += [found[start : start + size] for start in range(0, len(found) - size + 1, size)]
    return made
