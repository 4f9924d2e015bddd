"""Activation ranges of their own for the conditional and the unconditional rows of a call (CFG).

Both branches of classifier-free guidance run in one batch but not on the same numbers: where they differ, one grid for
both wastes codes, and their difference is what cfg multiplies (TR-DQ, 2503.06564, takes the branches apart too).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

CONDITIONAL = 0
BRANCHES = 2


def split(x: Tensor, branches: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Rows of a batch by branch: [(branch, rows), ...] in the order of the batch; equal neighbours stay together.

    x [B, ...] with B a multiple of len(branches). Any other batch is taken as one piece of the first branch.
    """
    if len(set(branches)) < 2 or x.shape[0] % len(branches):
        return [(branches[0] if branches else CONDITIONAL, x)]
    rows = x.shape[0] // len(branches)
    pieces: list[tuple[int, int]] = []
    for branch in branches:
        if pieces and pieces[-1][0] == branch:
            pieces[-1] = (branch, pieces[-1][1] + rows)
        else:
            pieces.append((branch, rows))
    return list(zip([b for b, _ in pieces], x.split([n for _, n in pieces]), strict=True))
