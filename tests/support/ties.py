"""Two ways to the same codes, compared where they part: at the layer, before rounding carries the difference on.

Two computations of one value differ in their last bits, from processor to processor in other ones. Where the value lies
between two codes, one then takes the lower and the other the higher. That is right, however large the difference that
a chain of layers makes of it in the end: so no verdict is taken there.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def only_ties_differ(found: Tensor, wanted: Tensor, exact: Tensor, noise: float) -> None:
    """Assert that codes are one apart at most, and that only where the value is as good as between them.

    found, wanted: codes, integers of one shape. exact: float64, the value in units of a code, before it is rounded.
    noise: by how much a float32 computation may miss `exact`, in the same unit.
    """
    apart = (found.long() - wanted.long()).abs()
    assert int(apart.max()) <= 1
    to_the_middle = (exact - exact.floor() - 0.5).abs()
    assert float(to_the_middle[apart > 0].max() if bool(apart.any()) else 0.0) <= noise


def noise_of(exact: Tensor, operations: int) -> float:
    """Bound of what `operations` roundings of float32 in a row make of values that are at most as large as these."""
    return operations * EPS * float(exact.abs().max())
