"""The time axis, its partition into intervals, and the clock that tells the leaves where a run is.

Everything that varies over time is a function on the axis, never of a step counter, so that a calibration holds for
any sampler, scheduler and number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .last_input import LastInput


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


class Clock:
    """The interval of the model call now running, as one device tensor that all leaves of a model share.

    A tensor, because a Python number read inside a layer would force a device sync per layer and would be frozen into
    a compiled or captured graph.
    """

    def __init__(self, axis: TimeAxis, partition: Partition) -> None:
        self.axis = axis
        self.partition = partition
        self._index: dict[torch.device, Tensor] = {}
        self.branches: tuple[int, ...] = (0,)
        self.last_input = LastInput()

    def set(self, t: Tensor, branches: tuple[int, ...] = (0,)) -> None:
        """`t`: timesteps of one call, [B] or a scalar; the rows of one call share their timestep, the first counts.

        `branches`: which equal share of the batch is conditional (0) and which unconditional (1), in order.
        """
        self.branches = branches
        self.last_input.drop()
        index = self.partition.index(self.axis.position(t.reshape(-1)[:1]))
        self._slot(t.device).copy_(index)
        for device, slot in self._index.items():
            if device != t.device:
                slot.copy_(index)

    def index(self, device: torch.device) -> Tensor:
        """int64 tensor [1] on `device`, updated in place by `set`."""
        return self._slot(device)

    def _slot(self, device: torch.device) -> Tensor:
        slot = self._index.get(device)
        if slot is None:
            # A new device starts where the others are; the first one of all starts at the noisy end.
            last = next(iter(self._index.values()), None)
            start = torch.tensor([self.partition.count - 1]) if last is None else last
            with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
                slot = torch.empty(1, dtype=torch.int64, device=device)
            slot.copy_(start)
            self._index[device] = slot
        return slot

    def __deepcopy__(self, memo: dict) -> Clock:
        return self  # a copied leaf still belongs to the run of its model
