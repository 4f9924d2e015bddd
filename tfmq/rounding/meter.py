"""What a run takes: bytes and seconds."""

from __future__ import annotations

import time


class Meter:
    """peak: most bytes at a time. seconds: by what they were spent on."""

    def __init__(self) -> None:
        self.used = self.peak = 0
        self.seconds: dict[str, float] = {}

    def count(self, nbytes: int) -> None:
        """So many bytes more, or less, are held."""
        self.used += nbytes
        self.peak = max(self.peak, self.used)

    def time(self, what: str, began: float) -> None:
        """began: of `time.perf_counter`."""
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began
