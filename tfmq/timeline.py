"""The time axis, its partition into intervals, and the clock that tells where on it a run is.

Everything that varies over time is a function on the axis, never of a step counter, so that a calibration holds for
any sampler, scheduler and number of steps.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TimeAxis:
    """Maps the timestep `t` that the network receives linearly to [0, 1].

    `low`, `high`: timesteps of the least and the most noise (0 and 999 for the discrete models, 0 and 1 or 1000 for
    flow models). Values beyond are clamped.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.high > self.low:
            raise ValueError(f"a time axis needs high > low, got {self.low} .. {self.high}")

    def position(self, t: Tensor) -> Tensor:
        """Timesteps of any shape -> positions in [0, 1], float32, same shape and device."""
        return ((t.float() - self.low) / (self.high - self.low)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Partition:
    """Intervals of the time axis. `edges`: the inner edges, ascending, in (0, 1); n edges make n + 1 intervals."""

    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        if any(b <= a for a, b in pairwise((0.0, *self.edges, 1.0))):
            raise ValueError("interval edges must ascend strictly inside (0, 1)")

    @classmethod
    def uniform(cls, count: int) -> Partition:
        """`count` intervals of equal width."""
        if count < 1:
            raise ValueError(f"at least one interval is needed, got {count}")
        return cls(tuple(i / count for i in range(1, count)))

    @property
    def count(self) -> int:
        return len(self.edges) + 1

    @property
    def centers(self) -> tuple[float, ...]:
        bounds = (0.0, *self.edges, 1.0)
        return tuple((a + b) / 2 for a, b in pairwise(bounds))

    def index(self, position: Tensor) -> Tensor:
        """Positions in [0, 1] -> interval numbers, int64, same shape and device; an edge belongs to the upper one."""
        edges = torch.tensor(self.edges, dtype=position.dtype, device=position.device)
        return torch.bucketize(position, edges, right=True)


class Moment:
    """Where the model call that now runs on one device is. index: its interval, int64 [1], written in place.

    branches: which equal share of the batch is conditional (0) and which unconditional (1), in order. leader: the
    thread whose calls on this device set it.
    """

    def __init__(self, index: Tensor, branches: tuple[int, ...]) -> None:
        self.index = index
        self.branches = branches
        self.leader: weakref.ref[threading.Thread] | None = None

    def move(self, index: Tensor, branches: tuple[int, ...]) -> None:
        """To another interval, int64 [1]."""
        self.branches = branches
        self.index.copy_(index)

    def follows(self, thread: threading.Thread) -> bool:
        """Whether a call in `thread` on another device moves this one too: no other thread has calls here."""
        leader = None if self.leader is None else self.leader()
        return leader is None or leader is thread or not leader.is_alive()


class Clock:
    """The interval of the model call now running, as a device tensor that all layers of a model there share.

    A tensor, because a Python number read inside a layer would force a device sync per layer and would be frozen into
    a compiled or captured graph. There is a moment per device: with several GPUs the host runs calls of one model at
    the same time, in a thread for each.
    """

    moment: type[Moment] = Moment

    def __init__(self, axis: TimeAxis, partition: Partition) -> None:
        self.axis = axis
        self.partition = partition
        self._moments: dict[torch.device, Moment] = {}
        self._lock = threading.RLock()

    def set(self, t: Tensor, branches: tuple[int, ...] = (0,)) -> None:
        """A call begins on the device of `t`: timesteps, [B] or a scalar; the rows of one call share theirs, the first
        counts. Devices on which no other thread has calls follow. branches: as in `Moment`.
        """
        index = self.partition.index(self.axis.position(t.reshape(-1)[:1]))
        thread = threading.current_thread()
        with self._lock:
            here = self.at(t.device)
            here.leader = weakref.ref(thread)
            for moment in self._moments.values():
                if moment is here or moment.follows(thread):
                    moment.move(index, branches)

    def index(self, device: torch.device) -> Tensor:
        """int64 tensor [1] on `device`, updated in place by `set`."""
        return self.at(device).index

    def at(self, device: torch.device) -> Moment:
        """The moment on `device`, always the same object."""
        found = self._moments.get(device)
        return self._new(device) if found is None else found

    def _new(self, device: torch.device) -> Moment:
        with self._lock:
            if device not in self._moments:
                # A new device starts where the others are; the first one of all starts at the noisy end.
                last = next(iter(self._moments.values()), None)
                with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
                    index = torch.empty(1, dtype=torch.int64, device=device)
                index.copy_(torch.tensor([self.partition.count - 1]) if last is None else last.index)
                self._moments[device] = self.moment(index, (0,) if last is None else last.branches)
            return self._moments[device]

    def __deepcopy__(self, memo: dict) -> Clock:
        return self  # a copied layer still belongs to the run of its model

    def __getstate__(self) -> dict[str, Any]:
        where = {device: (moment.index, moment.branches) for device, moment in self._moments.items()}
        return {"axis": self.axis, "partition": self.partition, "where": where}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["axis"], state["partition"])  # type: ignore[misc]
        self._moments = {device: self.moment(*where) for device, where in state["where"].items()}
