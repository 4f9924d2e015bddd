"""The static grids of all leaves of a model on one device, at the interval that now is.

Each leaf reading its row of its own table would be two launches per leaf and call, over a thousand for SDXL. Here the
tables of all leaves lie together, one gather per block of them writes what holds now, and the leaves keep views of it.
The memory of a block never moves, so that a captured CUDA graph reads the grids of the interval at hand.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import StaticInput
from .tables import Tables

SMALLEST = 64  # rows of the first block
# Entries between two grids: Triton compiles one kernel for addresses that divide by 16 bytes, another for the rest.
SPACING = 4


class Row(NamedTuple):
    """A grid as it now is, written in place by `Grids.gather`. tables: those that it was made of."""

    grid: StaticInput
    at: Grids
    tables: Tables


class _Block:
    """table: int32 [rows, 2, I], the bits of the scales and the zero points; now: int32 [rows, 2, SPACING]."""

    def __init__(self, rows: int, intervals: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
            self.table = torch.zeros(rows, 2, intervals, dtype=torch.int32, device=device)
            self.now = torch.zeros(rows, 2, SPACING, dtype=torch.int32, device=device)
        self.free = list(range(rows))[::-1]

    def gather(self, index: Tensor, rows: slice) -> None:
        self.now[rows, :, :1].copy_(self.table[rows].index_select(2, index))


class Grids:
    """index: the interval, int64 [1], on the device of the grids. For one thread at a time."""

    def __init__(self, index: Tensor) -> None:
        self._index = index
        self._blocks: dict[int, list[_Block]] = {}  # by the number of intervals
        self._places: weakref.WeakKeyDictionary[object, dict[int, tuple[_Block, int]]] = weakref.WeakKeyDictionary()

    def row(self, owner: object, branch: int, tables: Tables) -> Row:
        """The row of a leaf. branch: of CFG, whose grids it takes where they are apart.

        The same owner and branch keep their place: new tables are written over the old ones. It is free again when the
        owner is gone.
        """
        scale, zero_point = tables.grid(branch)
        block, at = self._place(owner, branch, scale.shape[0])
        both = torch.stack([scale.detach().float().view(torch.int32), zero_point.detach().int()])
        block.table[at].copy_(both)
        block.gather(self._index, slice(at, at + 1))
        with torch.inference_mode(False):
            views = block.now[at, 0, :1].view(torch.float32), block.now[at, 1, :1]
        return Row(StaticInput(*views, tables.inverse_balance), self, tables)

    def gather(self) -> None:
        """Write all rows of the interval that now is."""
        for blocks in self._blocks.values():
            for block in blocks:
                block.gather(self._index, slice(None))

    def _place(self, owner: object, branch: int, intervals: int) -> tuple[_Block, int]:
        places = self._places.setdefault(owner, {})
        found = places.get(branch)
        if found is not None and found[0].table.shape[2] == intervals:
            return found
        blocks = self._blocks.setdefault(intervals, [])
        block = next((block for block in blocks if block.free), None)
        if block is None:  # as large as all before it, so that there are few
            rows = max(SMALLEST, sum(block.table.shape[0] for block in blocks))
            block = _Block(rows, intervals, self._index.device)
            blocks.append(block)
        at = block.free.pop()
        weakref.finalize(owner, block.free.append, at).atexit = False
        places[branch] = block, at
        return block, at
