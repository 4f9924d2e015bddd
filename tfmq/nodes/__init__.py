"""The nodes, one file a subject: schema and tooltips here, the work in `tfmq.host`."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "TFMQ"
CalibrationType = io.Custom("TFMQ_CALIBRATION")
