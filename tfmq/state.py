"""One layer's integers: what solving makes, leaves hold and files store."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .formats.int4 import Grid, Packed
from .scheme import Scheme


@dataclass(frozen=True)
class LayerState:
    """One quantized layer.

    shape: of the weight. codes: int8 of that shape at 8 bits, packed uint8 [N, K' / 2] (`grouped`) at 4; scale float32
    [N]; factor, zero: uint8 [N, K' / group] at 4 bits, else None; balance float32 [K] or None; act_scale float32 and
    act_zero_point int32 of a static activation, [I], or [2, I] with the branches apart; else None. permutations:
    integers [1, K] or [2, K] of the rotation, or None. weight = codes * scale, rotated back by `scheme.rotation` and
    `permutations`, / balance.
    """

    kind: str
    scheme: Scheme
    shape: tuple[int, ...]
    codes: Tensor
    scale: Tensor
    balance: Tensor | None
    act_scale: Tensor | None
    act_zero_point: Tensor | None
    factor: Tensor | None = None
    zero: Tensor | None = None
    permutations: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in vars(self).values() if isinstance(part, Tensor))

    @property
    def packed(self) -> Packed | None:
        """The weight of a layer in 4 bits."""
        if self.factor is None or self.zero is None:
            return None
        return Packed(self.codes, Grid(self.scale, self.factor, self.zero, self.scheme.group), self.shape)


@dataclass(frozen=True)
class Rounded:
    """What `rounding` found for one layer: codes uint8 [N, K'] on a grid, the activation table where that was tuned
    too, and a few words on how it went."""

    codes: Tensor
    grid: Grid
    act_scale: Tensor | None = None
    act_zero_point: Tensor | None = None
    note: str = ""
