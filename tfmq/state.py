"""One layer's integers: what solving makes, leaves hold and files store.

`tensors` and `from_tensors` are the one list of a layer's tensors, by the names of the fields: of the layouts of the
host, of a model file and of the files of finished roundings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .formats.int4 import Grid, Packed
from .scheme import STATIC, Scheme

GROUPED = "factor", "zero"  # what a grid of groups has beside its scale
TABLES = "act_scale", "act_zero_point"

_T = TypeVar("_T", bound="_Tensors")


class _Tensors:
    """A dataclass some of whose fields are tensors."""

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, of those that are there."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self: _T, device: torch.device | str) -> _T:
        """The same with all tensors on `device`."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class LayerState(_Tensors):
    """One quantized layer.

    shape: of the weight. codes: int8 of that shape at 8 bits, packed uint8 [N, K' / 2] (`int4`) at 4; scale float32
    [N]; balance float32 [K] or None; act_scale float32 and act_zero_point int32 of a static activation, [I], or [2, I]
    with the branches apart; else None. factor, zero: uint8 [N, K' / group] at 4 bits, else None. permutations:
    integers [1, K] or [2, K] of the rotation, or None. weight = codes * scale, rotated back by `scheme.rotation` and
    `permutations`, / balance.
    """

    kind: str
    scheme: Scheme
    shape: tuple[int, ...]
    codes: Tensor
    scale: Tensor
    balance: Tensor | None = None
    act_scale: Tensor | None = None
    act_zero_point: Tensor | None = None
    factor: Tensor | None = None
    zero: Tensor | None = None
    permutations: Tensor | None = None

    @classmethod
    def from_tensors(
        cls, kind: str, scheme: Scheme, shape: tuple[int, ...], tensors: Mapping[str, Tensor | None]
    ) -> LayerState:
        """The inverse of `tensors`; those that are None count as not there. Raises KeyError with the name of one that
        the scheme needs and that is not there."""
        needed = *(GROUPED if scheme.grouped else ()), *(TABLES if scheme.activation == STATIC else ())
        return cls(kind, scheme, shape, **_checked(tensors, needed))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tensors().values())

    @property
    def packed(self) -> Packed | None:
        """The weight of a layer in 4 bits."""
        if self.factor is None or self.zero is None:
            return None
        return Packed(self.codes, Grid(self.scale, self.factor, self.zero, self.scheme.group), self.shape)


TENSORS = tuple(field.name for field in fields(LayerState))[3:]


@dataclass(frozen=True)
class Rounded(_Tensors):
    """What the weight of one layer was rounded to: at 8 bits codes int8 [N, K, ...] and scale float32 [N], at 4 codes
    uint8 [N, K'] on a `Grid`, here with its fields apart; the activation table where that was tuned too, and a few
    words on how it went."""

    codes: Tensor
    scale: Tensor
    factor: Tensor | None = None
    zero: Tensor | None = None
    group: int = 0
    act_scale: Tensor | None = None
    act_zero_point: Tensor | None = None
    note: str = ""

    @classmethod
    def from_tensors(cls, group: int, note: str, tensors: Mapping[str, Tensor]) -> Rounded:
        """The inverse of `tensors`. Raises KeyError with the name of one that is missing."""
        return cls(group=group, note=note, **_checked(tensors, GROUPED if group else ()))

    @property
    def grid(self) -> Grid:
        """Of 4 bits."""
        assert self.factor is not None and self.zero is not None
        return Grid(self.scale, self.factor, self.zero, self.group)


def _checked(tensors: Mapping[str, Tensor | None], needed: tuple[str, ...]) -> dict[str, Any]:
    found = {name: value for name, value in tensors.items() if value is not None}
    for name in ("codes", "scale", *needed):
        if name not in found:
            raise KeyError(name)
    return found
