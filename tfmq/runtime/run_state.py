"""What the leaves of one MODEL share while it runs: the clock, and on each device their grids and the last input."""

from __future__ import annotations

import torch
from torch import Tensor

from ..timeline import Clock, Moment
from .grids import Grids
from .shared_input import SharedInput


class Here(Moment):
    """A moment, and what the leaves on its device share. grids: of all of them, at its interval."""

    def __init__(self, index: Tensor, branches: tuple[int, ...]) -> None:
        super().__init__(index, branches)
        self.shared_input = SharedInput()
        self.grids = Grids(index)

    def move(self, index: Tensor, branches: tuple[int, ...]) -> None:
        self.shared_input.drop()
        super().move(index, branches)
        self.grids.gather()


class RunState(Clock):
    """A clock whose moments hold what the leaves share, so that what one call left is gone when the next begins."""

    moment = Here

    def at(self, device: torch.device) -> Here:
        found = self._moments.get(device)
        return self._new(device) if found is None else found  # type: ignore[return-value]
