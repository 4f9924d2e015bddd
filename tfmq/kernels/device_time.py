"""How long a launch takes on a GPU, without the time that Python needs to launch it.

A launch costs the host tens of microseconds and the kernels that are compared here take less. The device is kept busy
until all launches are queued, so that they run back to back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import torch

RUNS = 10  # per measurement
TRIES = 4  # with a longer wait each, where the host was too slow
CYCLES = 3e9  # of a GPU's clock in a second, at least: a wait may be too long, and one too short is seen
LONGEST = 0.1  # of such a wait: where launches block (CUDA_LAUNCH_BLOCKING, a profiler), none is long enough
SHORTEST = 5e-4  # seconds that the device is kept busy at first: about RUNS launches of 30 us, with room


class Mark(Protocol):
    """A place in a device's queue."""

    def query(self) -> bool:
        """Whether the device has come by."""

    def elapsed_time(self, later: Any, /) -> float:
        """Milliseconds on the device from here to a later mark, both passed."""


class Device(Protocol):
    def busy(self, seconds: float) -> None:
        """Queue what keeps the device busy for at least so long."""

    def mark(self) -> Mark:
        """Queue a mark."""

    def wait(self) -> None:
        """Until the queue is empty."""


class Cuda:
    """The current stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def busy(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * CYCLES))

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


class Stopwatch:
    """Measures on one device, which is the current one. now: seconds of the host's clock."""

    def __init__(self, device: Device, now: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.now = now
        self.ahead = SHORTEST  # seconds that the device is kept busy; what was enough last time

    def seconds(self, run: Callable[[], None]) -> float:
        """Device time of one `run`, which only queues launches. Raises what `run` raises.

        Where the host is too slow even for the longest wait, its time is part of the result.
        """
        run()  # compiles, and allocates what later ones use again
        took = 0.0
        for _ in range(TRIES):
            self.device.wait()
            self.device.busy(self.ahead)
            start = self.device.mark()
            began = self.now()
            for _ in range(RUNS):
                run()
            queued = self.now() - began
            idle = start.query()  # the device was through with waiting before all was queued
            end = self.device.mark()
            self.device.wait()
            took = start.elapsed_time(end) / 1e3 / RUNS
            if not idle or self.ahead == LONGEST:
                break
            self.ahead = min(LONGEST, 2 * max(self.ahead, queued))
        return took


@lru_cache
def stopwatch(device: torch.device) -> Stopwatch:
    """The one of a CUDA device."""
    return Stopwatch(Cuda(device))
