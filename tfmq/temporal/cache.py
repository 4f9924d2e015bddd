"""Temporal features from a table: rows computed once, read by index (cache-based maintenance, Huang et al., "Temporal
Feature Matters", 2024: keep the features, not the modules that make them).

One entry of the table holds what all cached modules answer in one call of the network. Which entry a call needs is
decided outside the network and written into an index tensor; a module inside only gathers rows. So nothing in the
network's graph depends on Python values that change from step to step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GROWTH = 4  # a full table grows by a quarter at least, so that rows that come one by one do not move it each time


@contextmanager
def _lasting() -> Iterator[None]:
    """For tensors that outlive a run: those made under inference_mode could not be written to outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass
class Statistics:
    """Of one run. calls: of the network; hits: those answered by rows that were there; filled: entries computed because
    a call asked for them; prefetched: entries computed ahead; evicted: entries that had to go; bypassed: calls that ran
    on the weights."""

    calls: int = 0
    hits: int = 0
    filled: int = 0
    prefetched: int = 0
    evicted: int = 0
    bypassed: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.calls if self.calls else 0.0


@dataclass
class Group:
    """The modules that get the same input in a call. index: int64 [rows], the slot of each row, or None."""

    index: Tensor | None = None


@dataclass
class Entry:
    """slots: rows of the table that this entry owns. index: group -> int64 [rows] of them. unread: computed ahead and
    not asked for yet."""

    slots: list[int]
    index: dict[str, Tensor]
    unread: bool
    complete: bool = False


class FeatureTable:
    """Entries by key, least recently used first out, within a budget of bytes.

    row_bytes: bytes of one slot over all modules. A single entry is kept even if it is larger than the budget.
    """

    def __init__(self, budget: int, row_bytes: int) -> None:
        self.budget, self.row_bytes = budget, row_bytes
        self.rows: dict[str, Tensor] = {}  # module path -> [capacity, ...]
        self.groups: dict[str, Group] = {}
        self.statistics = Statistics()
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._free: list[int] = []
        self._capacity = 0

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def reserve(self, key: Hashable, index: Mapping[str, list[int]], device: torch.device, ahead: bool = False) -> bool:
        """Make room for an entry, to be written and then completed.

        index: group -> for each row of the call, which of the entry's slots (0, 1, ...) holds it. ahead: the entry is
        not needed now, so it may not push out another that is waiting to be read. False if there is no room.
        """
        count = 1 + max(max(local) for local in index.values())
        limit = max(self.budget // max(self.row_bytes, 1), count)
        while len(self._free) < count:
            missing = count - len(self._free)
            if self._capacity + missing <= limit:
                more = min(max(missing, self._capacity // GROWTH), limit - self._capacity)
                self._free += range(self._capacity, self._capacity + more)
                self._capacity += more
                break
            victim = next((k for k, e in self._entries.items() if e.complete and not (ahead and e.unread)), None)
            if victim is None:
                return False
            self.drop(victim)
            self.statistics.evicted += 1
        slots, self._free = self._free[:count], self._free[count:]
        with _lasting():
            indices = {
                group: torch.tensor([slots[i] for i in local], dtype=torch.int64, device=device)
                for group, local in index.items()
            }
        self._entries[key] = Entry(slots, indices, ahead)
        return True

    def write(self, key: Hashable, path: str, rows: Tensor) -> None:
        """Rows [n, ...] of one module into the first n slots of an entry.

        Raises ValueError if they do not have the shape or dtype of the module's earlier rows.
        """
        table = self.rows.get(path)
        if table is not None and (table.dtype != rows.dtype or table.shape[1:] != rows.shape[1:]):
            raise ValueError(
                f"The features of {path} were {table.dtype} {tuple(table.shape[1:])} and are now {rows.dtype} "
                f"{tuple(rows.shape[1:])}: clear the table first."
            )
        with _lasting():
            if table is None or table.shape[0] < self._capacity:
                larger = torch.zeros((self._capacity, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
                if table is not None:
                    larger[: table.shape[0]] = table
                self.rows[path] = table = larger
            for slot, row in zip(self._entries[key].slots, rows, strict=False):
                table[slot].copy_(row)

    def complete(self, key: Hashable) -> None:
        self._entries[key].complete = True

    def drop(self, key: Hashable) -> None:
        """Forget an entry, if it is there."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._free += entry.slots

    def clear(self) -> None:
        """Forget everything and free the memory."""
        self._entries.clear()
        self.rows.clear()
        self._free, self._capacity = [], 0
        for group in self.groups.values():
            group.index = None

    def all_read(self) -> None:
        """The run is over: what was computed ahead for it waits for nobody."""
        for entry in self._entries.values():
            entry.unread = False

    def select(self, key: Hashable) -> bool:
        """Point all groups at an entry. False if it is not there."""
        entry = self._entries.get(key)
        if entry is None or not entry.complete:
            return False
        self._entries.move_to_end(key)
        entry.unread = False
        with _lasting():
            for name, index in entry.index.items():
                group = self.groups[name]
                if group.index is None or group.index.shape != index.shape or group.index.device != index.device:
                    group.index = index.clone()
                else:
                    group.index.copy_(index)  # in place: a captured graph goes on reading the same memory
        return True


class Switch:
    """What all cached modules of a model look at. bypass: run on the weights. compute: (path, input) -> output of the
    real module. expected: group -> the input of the present call that its rows were computed from, to compare with, or
    None; wrong: paths of modules that got something else."""

    def __init__(self, compute: Callable[[str, Tensor], Tensor]) -> None:
        self.compute = compute
        self.bypass = True
        self.expected: Mapping[str, Tensor] | None = None
        self.wrong: set[str] = set()


class CachedLayer(nn.Module):
    """Stands in for a module whose output depends on t and vectors alone: no parameters, answers with rows of a table.

    The real module is reachable under `real`, but is not a child, so that nobody loads or counts its weights. State
    dicts show its weights under their usual names.
    """

    real: nn.Module
    table: FeatureTable
    _OF_REAL = (
        "weight",
        "bias",
        "set_weight",
        "convert_weight",
        "set_bias",
        "convert_bias",
        "in_features",
        "out_features",
    )

    def __init__(
        self, path: str, real: nn.Module, name: str, group: Group, switch: Switch, table: FeatureTable
    ) -> None:
        super().__init__()
        self.path, self.group, self.switch, self.name = path, group, switch, name
        self.rows: Tensor | None = None
        self.input_shape: tuple[int, ...] | None = None
        self.trusted = True
        object.__setattr__(self, "real", real)
        object.__setattr__(self, "table", table)

    def bind(self, input_shape: tuple[int, ...] | None) -> None:
        """Take over where the table keeps this module's rows. input_shape: of one row of its input."""
        self.rows = self.table.rows.get(self.path)
        self.input_shape = input_shape

    def forward(self, x: Tensor) -> Tensor:
        rows, index = self.rows, self.group.index
        if (
            rows is None
            or index is None
            or self.switch.bypass
            or not self.trusted
            or x.shape[0] != index.shape[0]
            or x.shape[1:] != self.input_shape
            or x.device != rows.device
        ):
            return self.uncached(x)
        if not torch.compiler.is_compiling() and self.switch.expected is not None:
            expected = self.switch.expected[self.name]
            if x.dtype != expected.dtype or not torch.equal(x, expected):
                self.switch.wrong.add(self.path)
                return self.uncached(x)
        return rows.index_select(0, index)

    @torch.compiler.disable
    def uncached(self, x: Tensor) -> Tensor:
        return self.switch.compute(self.path, x)

    def __getattr__(self, name: str) -> Any:
        real = self.__dict__.get("real")
        if real is not None and (name in CachedLayer._OF_REAL or name in real._modules):
            return getattr(real, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):  # the host puts a merged weight in place of the old one
            setattr(self.real, name, value)
        else:
            super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        self.real.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)


def equal_rows(x: Tensor) -> list[int]:
    """x [rows, ...] -> for each row the number, counted from 0, of the distinct row that it is, bit by bit."""
    seen: dict[bytes, int] = {}
    flat = x.detach().reshape(x.shape[0], -1).contiguous().view(torch.uint8).cpu()
    return [seen.setdefault(bytes(row.numpy()), len(seen)) for row in flat]
