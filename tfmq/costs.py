"""What a kind of Linear layer costs in time, for the plan's choice between them."""

from __future__ import annotations

from dataclasses import dataclass

NARROW = 320  # input channels, with which the product takes little of a layer's time


@dataclass(frozen=True)
class Costs:
    """Times over that of a static layer. `dynamic`: of a per-token one; `narrow`: of a per-token one of up to NARROW
    input channels, where that is more. `rotation`: what a rotation of the input adds; 0 where it was not measured.
    """

    dynamic: float = 1.0
    rotation: float = 0.0
    narrow: float = 0.0

    def per_token(self, channels: int) -> float:
        """Of a per-token layer of so many input channels."""
        return max(self.dynamic, self.narrow) if channels <= NARROW else self.dynamic


FREE = Costs()
