"""TFMQ Quantize."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.utils
from comfy_api.latest import io, ui

from ..errors import TfmqError
from ..formats.int4 import GROUPS
from ..host import quantize, summary
from ..host.temporal import quantize as temporal_quant
from ..scheme import AT_A_QUALITY, PRESETS, ROUNDINGS, UNDER_A_SIZE
from . import CATEGORY, CalibrationType


class Quantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_Quantize",
            display_name="TFMQ Quantize",
            category=CATEGORY,
            description=(
                "Swaps the layers of the model for ones that compute in integers, with weights of 8 or 4 bits, "
                "convolutions included. LoRAs on the model are baked in; LoRAs behind this node work as usual and are "
                "never rounded."
            ),
            search_aliases=["int8", "int4", "w8a8", "w4a8", "quantization", "compress", "faster", "low vram"],
            inputs=[
                io.Model.Input("model", tooltip="The same MODEL that went into TFMQ Calibrate."),
                CalibrationType.Input("calibration", tooltip="From TFMQ Calibrate."),
                io.Combo.Input(
                    "recipe", options=list(PRESETS), default="W8A8",
                    tooltip=(
                        "How small. W8A8: 8-bit weights and activations. Linear only: convolutions stay in float. "
                        "W4A8: 4-bit weights, half the size. W4A16: 4-bit weights, computes in float (NF4, FP4: Linear "
                        "layers by bitsandbytes). Best under a size, smallest at a quality: 4, 8 or 16 bits per layer."
                    ),
                ),
                io.Combo.Input(
                    "activations", options=["auto", "static", "dynamic"], default="auto", advanced=True,
                    tooltip="Linear layers: ranges per interval from the calibration, or per token at run time.",
                ),
                io.Combo.Input(
                    "ranges", options=["mse", "percentile", "minmax", "one range", "tdq"], default="mse", advanced=True,
                    tooltip=(
                        "How a static range is chosen: per interval by least error, percentile or extremes; one range "
                        "for all of time; or a learned smooth function of time (TDQ)."
                    ),
                ),
                io.Combo.Input(
                    "temporal", options=list(temporal_quant.MODES), default=temporal_quant.FLOAT, advanced=True,
                    optional=True,
                    tooltip=(
                        "Layers that only know the timestep (SD1.5-like models): left in float, in integers with "
                        "rounding fitted to all timesteps, or the best mix with caches within the bytes of int8."
                    ),
                ),
                io.Combo.Input(
                    "effort", options=list(ROUNDINGS), default=ROUNDINGS[0], optional=True,
                    tooltip=(
                        "How long, for 4-bit weights. nearest: seconds. fast: rounding that makes up for its own "
                        "errors. balanced: and for those of the layers before, scales tuned block by block; minutes "
                        "for a small model, longer for yours. best: rounding learnt block by block as well, days on a "
                        "CPU. best+: balanced (not best), then scales and time embedding fine-tuned against the float "
                        "model's predictions."
                    ),
                ),
                io.Combo.Input(
                    "group", options=[str(g) for g in GROUPS], default=str(GROUPS[0]), advanced=True, optional=True,
                    tooltip="Weights that share a range in 4 bits: fewer are more precise and a little larger.",
                ),
                io.Float.Input(
                    "size_mb", default=0.0, min=0.0, max=1e6, step=1.0, round=0.01, advanced=True, optional=True,
                    tooltip="For 'best under a size': MB of the diffusion model in the saved file.",
                ),
                io.Float.Input(
                    "quality_db", default=35.0, min=0.0, max=120.0, step=1.0, round=0.01, advanced=True, optional=True,
                    tooltip=(
                        "For 'smallest at a quality': how far the error of the model's prediction must stay below the "
                        "prediction, in dB; 10 more is a third of the error. Not the PSNR of pictures."
                    ),
                ),
                io.String.Input(
                    "plan", default="", multiline=True, advanced=True, optional=True,
                    tooltip=(
                        "The report of an earlier run with some bits changed, or a line like "
                        '{"layers": {"input_blocks.1.0.in_layers.2": 8}}; layers without a line are decided.'
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
        cls, model: Any, calibration: Any, recipe: str, activations: str = "auto", ranges: str = "mse",
        temporal: str = temporal_quant.FLOAT, effort: str = ROUNDINGS[0], group: str = str(GROUPS[0]),
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
                    "that the file may have."
                )
            wanted = replace(wanted, budget=int(size_mb * 1e6))
        elif recipe == AT_A_QUALITY:
            wanted = replace(wanted, quality=quality_db)
        bar = comfy.utils.ProgressBar(1)
        result = quantize.quantize(model, calibration.load(), wanted, bar.update_absolute, plan)
        record = quantize.require_quantized(result)
        text = summary.text(record)
        return io.NodeOutput(result, text, summary.report(record), ui=ui.PreviewText(text))
