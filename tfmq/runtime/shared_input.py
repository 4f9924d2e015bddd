"""The codes of the last input of a Linear, for the leaves that read the same tensor next (q, k, v; w1 and w3)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..geometry import Codes

ROWS = 8  # of every image, by which an inference tensor is known again


class Reading(NamedTuple):
    """How a leaf quantizes its input: leaves of equal readings make the same codes of it.

    digest: of its grids, balance and rotation. own: whether there are any, so that only layers that read one tensor
    have it in common (they are calibrated as one: `observe.ModelObserver`).
    """

    digest: bytes
    own: bool


class Reader(Protocol):
    """A leaf. reading: None if its codes are of no use to another. readers: how many leaves, itself included, were seen
    to read a tensor of which it was the first reader."""

    reading: Reading | None
    readers: int


@dataclass(eq=False)
class _Entry:
    input: weakref.ref[Tensor]
    reading: Reading
    backend: ModuleType
    first: weakref.ref[Reader]
    users: set[int] = field(default_factory=set)
    mark: int | Tensor | None = None
    codes: Codes | None = None


class LastInput:
    """What all leaves of a model share. Of one input alone anything is kept, and the input itself is not.

    The codes are at most as large as the input, and go with it, with the next integer layer, with the next call of the
    model, or as soon as the last of the leaves that are known to read it has used them.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def codes(self, leaf: Reader, x: Tensor, backend: ModuleType, quantize: Callable[[], Codes]) -> Codes | None:
        """The codes of x: those at hand, or new ones if other leaves were seen to read what this one reads. None: to be
        made for this leaf alone, in the way that is best for that.

        A leaf that comes twice gets new ones: it belongs to another call, for which an input that lies in one place may
        have been written to.
        """
        reading = leaf.reading
        if reading is None or not (reading.own or not x.is_inference() or x.device.type == "cpu"):
            self._entry = None
            return None
        entry = self._entry
        if (
            entry is None
            or entry.input() is not x
            or entry.reading != reading
            or entry.backend is not backend
            or id(leaf) in entry.users
        ):
            entry = _Entry(weakref.ref(x, self._gone), reading, backend, weakref.ref(leaf))
            self._entry = entry
        entry.users.add(id(leaf))
        first, count = entry.first() or leaf, len(entry.users)
        first.readers = max(first.readers, count)
        if first.readers == 1:
            return None
        codes = entry.codes
        if codes is None or not _unchanged(entry.mark, x):
            entry.codes = codes = None  # so that two are never in memory
            entry.mark = _mark(x)
            codes = quantize()
        entry.codes = codes if count < first.readers else None
        return codes

    def drop(self) -> None:
        self._entry = None

    def _gone(self, reference: weakref.ref[Tensor]) -> None:
        entry = self._entry
        if entry is not None and entry.input is reference:
            self._entry = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_entry": None}


def _mark(x: Tensor) -> int | Tensor | None:
    """What changes when x is written to: its version; of an inference tensor, which has none, some rows. None on a GPU,
    which would have to be waited for: there only `Reading.own` is shared, and a calibration that saw a tensor change
    between two layers gave them different ones."""
    if not x.is_inference():
        return x._version
    if x.device.type != "cpu":
        return None
    return x.clone() if x.dim() == 1 else x[..., :: max(1, x.shape[-2] // ROWS), :].clone()


def _unchanged(mark: int | Tensor | None, x: Tensor) -> bool:
    now = _mark(x)
    if isinstance(mark, Tensor) and isinstance(now, Tensor):
        return torch.equal(mark, now)
    return not isinstance(mark, Tensor) and mark == now
