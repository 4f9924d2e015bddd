"""The nodes, one file a subject: schema and tooltips here, the work in `tfmq.host`."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..words import Choices, told

CATEGORY = "TFMQ"
CalibrationType = io.Custom("TFMQ_CALIBRATION")


def combo(name: str, choices: Choices, about: str, **options: Any) -> Any:
    """An input that offers the names of a table, the first as its default. about: what is chosen, for the tooltip."""
    return io.Combo.Input(
        name, options=list(choices), default=next(iter(choices)), tooltip=f"{about} {told(choices)}", **options
    )
