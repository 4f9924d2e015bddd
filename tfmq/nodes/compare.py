"""TFMQ Compare."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..errors import TfmqError
from ..report import metrics, sheet
from ..words import counted
from . import CATEGORY


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_Compare",
            display_name="TFMQ Compare",
            category=CATEGORY,
            description=(
                "Compares two batches of pictures made with the same seeds: side by side with their amplified "
                "difference, and by PSNR and SSIM (and LPIPS where the lpips package and its weights are installed)."
            ),
            search_aliases=["psnr", "ssim", "lpips", "difference", "side by side"],
            inputs=[
                io.Image.Input("reference", tooltip="Pictures of the float model."),
                io.Image.Input("candidate", tooltip="Pictures of the quantized model, with the same seeds."),
                io.Float.Input(
                    "amplify", default=8.0, min=1.0, max=255.0, step=1.0, advanced=True,
                    tooltip="Factor on the difference, so that small errors are visible.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet"),
                io.String.Output(display_name="summary"),
                io.Float.Output(display_name="psnr_db"),
                io.Float.Output(display_name="ssim"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, reference: Any, candidate: Any, amplify: float = 8.0) -> io.NodeOutput:
        try:
            found = metrics.compare(reference, candidate)
        except ValueError as error:
            raise TfmqError(str(error)) from None
        pictures = sheet.side_by_side(reference, candidate, amplify=amplify)
        lpips = found["lpips"]
        text = f"{counted(found['images'], 'picture')}: PSNR {found['psnr_db']:.2f} dB, SSIM {found['ssim']:.4f}"
        text += f", LPIPS {lpips:.4f}" if lpips is not None else f" (no LPIPS: {metrics.lpips_unavailable_reason()})"
        return io.NodeOutput(
            pictures, text, float(found["psnr_db"]), float(found["ssim"]),
            ui={**ui.PreviewImage(pictures, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()},
        )  # fmt: skip
