"""A batch of samples on its way through a network."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .lanes import Lane
from .layer import Rows


@dataclass(eq=False)
class Pass:
    """One batch on its way through the network."""

    indices: list[int]
    rows: Rows
    quantized: bool
    held: bool
    shape: Hashable
    lane: Lane = field(init=False)
    probing: bool = False
    unit: str | None = None
    passed: set[str] = field(default_factory=set)
    twin: Pass | None = None  # the same rows in the other network, where there is one
    columns: Tensor | None = None  # of the layer at which it waits, until the twin has come there
    chosen: Tensor | None = None
    inputs: Any = None  # (args, kwargs) of the unit that it stands in, on the CPU
    outputs: list[Tensor] = field(default_factory=list)
