"""What a leaf knows of its input: the grids over time, the balance and the rotation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..state import LayerState


@dataclass(frozen=True, eq=False)
class Tables:
    """Tensors of one device, to which nobody writes: a leaf that is to have others gets other `Tables`.

    act_scale float32 and act_zero_point int32 of a static activation: [I], or [2, I] with the branches of CFG `apart`.
    inverse_balance: float32 [K]. permutations: integers [1, K] or [2, K] of the rotation. device: None without any.
    """

    act_scale: Tensor | None = None
    act_zero_point: Tensor | None = None
    inverse_balance: Tensor | None = None
    permutations: Tensor | None = None
    apart: bool = field(init=False)
    device: torch.device | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "apart", self.act_scale is not None and self.act_scale.dim() == 2)
        object.__setattr__(self, "device", next((t.device for t in self.tensors.values()), None))

    @classmethod
    def of(cls, state: LayerState) -> Tables:
        inverse = None if state.balance is None else state.balance.reciprocal()
        return cls(state.act_scale, state.act_zero_point, inverse, state.permutations)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, of those that there are."""
        names = "act_scale", "act_zero_point", "inverse_balance", "permutations"
        return {name: table for name in names if (table := getattr(self, name)) is not None}

    def grid(self, branch: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points [I] of a branch of CFG, of a static activation."""
        scale, zero_point = self.act_scale, self.act_zero_point
        assert scale is not None and zero_point is not None
        return (scale[branch], zero_point[branch]) if self.apart else (scale, zero_point)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Tables:
        """Where `move` brings them; a cast of the model does not touch them, the kernels want them as they are."""
        moved = {name: (table, move(table)) for name, table in self.tensors.items()}
        return Tables(**{n: to if to.dtype == t.dtype else t.to(to.device) for n, (t, to) in moved.items()})

    def digest(self, *more: object) -> bytes:
        """Equal for tables of equal contents, with equal `more`."""
        digest = hashlib.blake2b(repr(more).encode(), digest_size=16)
        for name, table in self.tensors.items():
            digest.update(f"{name} {table.dtype} {tuple(table.shape)}".encode())
            digest.update(table.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.digest()
