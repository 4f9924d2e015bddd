"""A calibration: everything that the observers learnt, and what identifies the model and the sampling set-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..timeline import Partition, TimeAxis
from .samples import Samples
from .statistics import LayerStatistics


@dataclass(frozen=True)
class Calibration:
    """`model`: fingerprint of the weights with their patches. `sampling`: the kind of timestep and prediction.

    `settings`: what was run (prompts, sampler, steps, ...), for people to read. `layers`: in the order of execution.
    `samples`: whole model calls, for reconstruction; None in a calibration of an older version.
    """

    model: str
    sampling: str
    axis: TimeAxis
    partition: Partition
    layers: dict[str, LayerStatistics]
    settings: dict[str, Any]
    samples: Samples | None = None
