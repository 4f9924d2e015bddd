"""The codes of the last input of a Linear, for the leaves that read the same tensor next (q, k, v; w1 and w3)."""

from __future__ import annotations

import weakref
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..geometry import Codes

ROWS = 8  # of every image, by which an inference tensor is known again


class Reading(NamedTuple):
    """How a leaf quantizes its input: leaves of equal readings make the same codes of it.

    digest: of its grids, balance and rotation. own: whether there are any, so that only layers that read one tensor
    have it in common (they are calibrated as one: `observe.model.ModelObserver`).
    """

    digest: bytes
    own: bool


class Reader(Protocol):
    """A leaf. reading: None if its codes are of no use to another. readers: how many leaves, itself included, were seen
    to read a tensor of which it was the first reader."""

    reading: Reading | None
    readers: int


class SharedInput:
    """What all leaves of a model on one device share. Of one input alone anything is kept, and the input itself is not.

    The codes are at most as large as the input, and go with it, with the next integer layer, with the next call of the
    model, or as soon as the last of the leaves that are known to read it has used them.
    """

    codes: Codes | None = None  # of what was read last
    _input: weakref.ref[Tensor] | None = None
    _reading: Reading
    _backend: ModuleType
    _first: weakref.ref[Reader]
    _last = True  # whether nobody is known to come behind who read last
    _mark: int | Tensor | None = None

    def __init__(self) -> None:
        self._users: list[int] = []

    def read(self, leaf: Reader, x: Tensor, backend: ModuleType) -> bool:
        """A leaf comes for the codes of x. False: nobody else reads it, so they are best made for this leaf alone.
        True: they are in `codes`, or to be made and to be given to `keep`.

        A leaf that comes twice gets new ones: it belongs to another call, for which an input that lies in one place may
        have been written to.
        """
        reading, before = leaf.reading, self._input
        if reading is None or not (reading.own or not x.is_inference() or x.device.type == "cpu"):
            self.drop()
            return False
        if (
            before is None
            or before() is not x
            or id(leaf) in self._users
            or self._backend is not backend
            or self._reading != reading
        ):
            self.codes = None
            self._input, self._reading, self._backend = weakref.ref(x), reading, backend
            self._first, self._users = weakref.ref(leaf), []
        self._users.append(id(leaf))
        first, count = self._first() or leaf, len(self._users)
        if count > first.readers:
            first.readers = count
        if first.readers == 1:
            return False
        self._last = count >= first.readers
        if self.codes is not None and not _unchanged(self._mark, x):
            self.codes = None  # so that two are never in memory
        if self.codes is None and not self._last:
            self._mark, self._input = _mark(x), weakref.ref(x, self._gone)
        return True

    def keep(self, codes: Codes) -> None:
        """The codes that the last reader used, for those that are known to come."""
        self.codes = None if self._last else codes

    def drop(self) -> None:
        self.codes = self._input = self._mark = None

    def _gone(self, reference: weakref.ref[Tensor]) -> None:
        if self._input is reference:
            self.drop()


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
