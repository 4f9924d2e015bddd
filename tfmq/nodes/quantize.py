"""TFMQ Quantize."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.utils
from comfy_api.latest import io, ui

from ..decide.grids import RANGES
from ..errors import TfmqError
from ..formats.int4 import GROUPS
from ..host import quantize, quantized, summary
from ..host.temporal import quantize as temporal_quant
from ..rounding.efforts import EFFORTS
from ..scheme import ACTIVATIONS, AT_A_QUALITY, PRESETS, RECIPES, UNDER_A_SIZE, Recipe
from . import CATEGORY, CalibrationType, combo


class Quantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_Quantize",
            display_name="TFMQ Quantize",
            category=CATEGORY,
            description=(
                "Replaces the layers of the model by ones that compute in integers, with weights of 8 or 4 bits, "
                "convolutions included. LoRAs on the model are baked in. LoRAs behind this node work as usual and are "
                "never rounded."
            ),
            search_aliases=["int8", "int4", "w8a8", "w4a8", "quantization", "compress", "faster", "low vram"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that went into TFMQ Calibrate, with the same LoRAs."),
                CalibrationType.Input("calibration", tooltip="From TFMQ Calibrate."),
                combo("recipe", RECIPES, "How small the model becomes."),
                combo("activations", ACTIVATIONS, "Ranges of the inputs of Linear layers.", advanced=True),
                combo("ranges", RANGES, "How a static range is chosen.", advanced=True),
                combo(
                    "temporal", temporal_quant.MODES, "Layers that only know the timestep (SD1.5-like models).",
                    advanced=True, optional=True,
                ),
                combo("effort", EFFORTS, "How 4-bit weights are rounded, and how long it takes.", optional=True),
                io.Combo.Input(
                    "group", options=[str(g) for g in GROUPS], default=str(GROUPS[0]), advanced=True, optional=True,
                    tooltip="4-bit weights that share a range. Fewer are more precise and a little larger.",
                ),
                io.Float.Input(
                    "size_mb", default=0.0, min=0.0, max=1e6, step=1.0, round=0.01, advanced=True, optional=True,
                    tooltip="For 'best under a size': MB of the diffusion model in the saved file.",
                ),
                io.Float.Input(
                    "quality_db", default=35.0, min=0.0, max=120.0, step=1.0, round=0.01, advanced=True, optional=True,
                    tooltip=(
                        "For 'smallest at a quality': how far the error of the model's prediction stays below the "
                        "prediction, in dB. 10 dB more is a third of the error. Not the PSNR of pictures."
                    ),
                ),
                io.String.Input(
                    "plan", default="", multiline=True, advanced=True, optional=True,
                    tooltip=(
                        "The report of an earlier run with some bits changed, or a line like "
                        '{"layers": {"input_blocks.1.0.in_layers.2": 8}}. Layers without a line are decided as without '
                        "a plan."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.String.Output(display_name="summary"),
                io.String.Output(display_name="report", tooltip="The same as JSON."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, calibration: Any, recipe: str, activations: str = Recipe.activations,
        ranges: str = Recipe.ranges, temporal: str = Recipe.temporal, effort: str = Recipe.rounding,
        group: str = str(GROUPS[0]),
        size_mb: float = 0.0, quality_db: float = 35.0, plan: str = "",
    ) -> io.NodeOutput:  # fmt: skip
        wanted = replace(
            PRESETS[recipe], activations=activations, ranges=ranges, temporal=temporal, rounding=effort,
            group=int(group),
        )  # fmt: skip
        if recipe == UNDER_A_SIZE:
            if size_mb <= 0:
                raise TfmqError(
                    f"The recipe '{recipe}' needs a size: set size_mb, an advanced input of TFMQ Quantize, to the MB "
                    "of the file."
                )
            wanted = replace(wanted, budget=int(size_mb * 1e6))
        elif recipe == AT_A_QUALITY:
            wanted = replace(wanted, quality=quality_db)
        bar = comfy.utils.ProgressBar(1)
        result = quantize.quantize(model, calibration.load(), wanted, bar.update_absolute, plan)
        record = quantized.require_quantized(result)
        text = summary.text(record)
        return io.NodeOutput(result, text, summary.report(record), ui=ui.PreviewText(text))
