"""What may be computed in one with a leaf, and how it is computed where that cannot be."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ..geometry import Norm, geglu


class Fused(NamedTuple):
    """norm: the input of a convolution is SiLU(norm(x)). gated: `geglu` follows a Linear."""

    norm: Norm | None = None
    gated: bool = False

    def before(self, x: Tensor) -> Tensor:
        """The leaf's input, in steps of its own."""
        return x if self.norm is None else F.silu(self.norm(x))

    def after(self, y: Tensor) -> Tensor:
        """What becomes of the leaf's output, in a step of its own."""
        return geglu(y) if self.gated else y


PLAIN = Fused()
GATED = Fused(gated=True)
