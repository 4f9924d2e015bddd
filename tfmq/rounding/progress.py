"""How far a reconstruction is, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable

PARTS = 10_000
Progress = Callable[[int, int, float], None]  # called with (done, total, seconds left)
BASE = 10.0  # what error feedback of a unit costs, in steps of learning it


class Countdown:
    """Progress in parts of the whole work. sizes: weights per unit."""

    def __init__(self, tell: Progress, sizes: dict[str, int], steps: int) -> None:
        self.tell, self.sizes, self.steps = tell, sizes, steps
        self.spent = dict.fromkeys(sizes, 0.0)
        self.total = sum(sizes.values()) * (BASE + steps)
        self.began, self.head_start = time.monotonic(), 0.0

    def found(self, unit: str) -> None:
        """A unit that an earlier run has finished: it says nothing about the speed of this one."""
        self.head_start += self._whole(unit) - self.spent[unit]
        self.spent[unit] = self._whole(unit)
        self._tell()

    def step(self, unit: str) -> None:
        self.spent[unit] += self.sizes[unit]
        self._tell()

    def finish(self, unit: str, share: float = 1.0) -> None:
        """So large a share of the unit is done, at least."""
        self.spent[unit] = max(self.spent[unit], self._whole(unit) * share)
        self._tell()

    def _whole(self, unit: str) -> float:
        return self.sizes[unit] * (BASE + self.steps)

    def _tell(self) -> None:
        done = sum(self.spent.values())
        own = done - self.head_start
        elapsed = time.monotonic() - self.began
        left = elapsed * (self.total - done) / own if own > 0 else 0.0
        self.tell(min(PARTS, int(done / max(self.total, 1) * PARTS)), PARTS, left)
