"""TFMQ Temporal Cache and TFMQ Temporal Report."""

from __future__ import annotations

import json
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui

from ..errors import TfmqError
from ..host.temporal import cache as temporal_cache
from ..host.temporal import report as temporal_report
from ..report import temporal as plots
from . import CATEGORY, CalibrationType


class TemporalCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_TemporalCache",
            display_name="TFMQ Temporal Cache",
            category=CATEGORY,
            description=(
                "Answers the layers that see only the timestep (28 to 34 % of the weights of Flux.1, SD3 and "
                "Qwen-Image) from a small table instead of loading their weights. The pictures stay the same."
            ),
            search_aliases=["modulation", "adaln", "low vram", "timestep embedding", "cache"],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL: float or quantized, with or without LoRAs."),
                io.Int.Input(
                    "budget_mb", default=512, min=1, max=1_000_000, advanced=True,
                    tooltip="The largest size of the table, in MB. The rows not used for longest are dropped first.",
                ),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="summary")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, budget_mb: int = 512) -> io.NodeOutput:
        result = temporal_cache.apply(model, budget_mb * 1_000_000)
        text = temporal_cache.describe(result)
        return io.NodeOutput(result, text, ui=ui.PreviewText(text))


class TemporalReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_TemporalReport",
            display_name="TFMQ Temporal Report",
            category=CATEGORY,
            description=(
                "Shows what quantization does to the layers whose output depends on the timestep alone: error curves "
                "over the timestep for each way to keep them, and the choice under a byte budget with its reasons. "
                "With a calibration also the activation ranges of all layers over time. For models like SD1.5."
            ),
            search_aliases=["temporal", "timestep", "TIB", "TIAR", "plot", "disturbance", "tfmq-dm"],
            inputs=[
                io.Model.Input("model", tooltip="The 16- or 32-bit model. LoRAs on it count."),
                CalibrationType.Input(
                    "calibration", optional=True, tooltip="From TFMQ Calibrate. Adds the heat map of ranges."
                ),
                io.Int.Input(
                    "budget_kb", default=0, min=0, max=1 << 22,
                    tooltip="Size of the temporal layers in kB (1000 bytes). 0: the size of their int8 variant.",
                ),
                io.Int.Input(
                    "intervals", default=25, min=1, max=200, advanced=True,
                    tooltip="The number of intervals on the time axis, for the curves and the choice.",
                ),
                io.Int.Input(
                    "tiar_steps", default=0, min=0, max=20000, advanced=True,
                    tooltip="Steps of the joint rounding behind the layer-wise one. TFMQ Quantize takes 0.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="curves"),
                io.Image.Output(display_name="ranges", tooltip="Needs a calibration. Without one: the curves again."),
                io.String.Output(display_name="summary"),
                io.String.Output(display_name="report", tooltip="All numbers as JSON."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, budget_kb: int, calibration: Any = None, intervals: int = 25, tiar_steps: int = 0
    ) -> io.NodeOutput:
        reason = plots.missing()
        if reason is not None:
            raise TfmqError(f"The plots cannot be drawn because {reason}: install it with pip and queue again.")
        bar = comfy.utils.ProgressBar(1)

        def progress(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        found = temporal_report.examine(model, intervals, tiar_steps, 1000 * budget_kb or None, progress)
        curves = plots.curves(found.curves(), found.centers, "timestep").unsqueeze(0)
        ranges, numbers = curves, temporal_report.data(found)
        if calibration is not None:
            learnt = calibration.load()
            axis = learnt.axis
            centers = [axis.low + c * (axis.high - axis.low) for c in learnt.partition.centers]
            numbers["activation_ranges"] = temporal_report.activation_ranges(learnt)
            ranges = plots.heat_map(numbers["activation_ranges"], centers, "timestep").unsqueeze(0)
        text = temporal_report.table(found)
        pictures = ui.PreviewImage(curves, cls=cls).as_dict()
        return io.NodeOutput(
            curves, ranges, text, json.dumps(_strict(numbers)), ui={**pictures, **ui.PreviewText(text).as_dict()}
        )


def _strict(value: Any) -> Any:
    """JSON has no NaN: None instead."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and value != value else value
