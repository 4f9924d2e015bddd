"""TFMQ Save and TFMQ Load."""

from __future__ import annotations

from typing import Any

import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..errors import TfmqError
from ..host import quantized, store, summary
from ..host.temporal import table as temporal_table
from . import CATEGORY, combo


class Save(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_Save",
            display_name="TFMQ Save",
            category=CATEGORY,
            description=(
                "Writes a quantized model as one .safetensors into the first of ComfyUI's diffusion model folders "
                "(models/unet by default). LoRAs behind TFMQ Quantize are not part of it."
            ),
            search_aliases=["save quantized", "export int8"],
            inputs=[
                io.Model.Input("model", tooltip="From TFMQ Quantize."),
                io.String.Input("filename_prefix", default="tfmq/model", tooltip="Folder and name of the file."),
                combo(
                    "temporal", temporal_table.SAVED_AS, "How layers that only know the timestep are saved.",
                    advanced=True, optional=True,
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, filename_prefix: str, temporal: str = temporal_table.WEIGHTS) -> io.NodeOutput:
        bar = comfy.utils.ProgressBar(1)
        path = store.save(model, filename_prefix, temporal, bar.update_absolute)
        return io.NodeOutput(str(path), ui=ui.PreviewText(store.receipt(path)))


class Load(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_Load",
            display_name="TFMQ Load",
            category=CATEGORY,
            description="Loads a model that TFMQ Save wrote, without a calibration. The pictures are the same.",
            search_aliases=["load quantized", "int8", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=store.saved_models(),
                    tooltip="A file of TFMQ Save, in any of ComfyUI's diffusion model folders.",
                )
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="summary")],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path(store.FOLDER, model_name)
        if path is None:
            raise TfmqError(f"{model_name} is no longer in ComfyUI's {store.FOLDER} folders: choose another file.")
        model = store.load(path)
        text = summary.text(quantized.require_quantized(model))
        warning = store.sampling_warning(model)
        text = f"{text}\nnote: {warning}" if warning else text
        return io.NodeOutput(model, text, ui=ui.PreviewText(text))

    @classmethod
    def fingerprint_inputs(cls, model_name: str) -> str:
        path = folder_paths.get_full_path(store.FOLDER, model_name)
        return f"{model_name} {store.stamp(path)}"

    @classmethod
    def validate_inputs(cls, model_name: str) -> bool | str:
        if folder_paths.get_full_path(store.FOLDER, model_name) is None:
            return f"{model_name} is not in ComfyUI's {store.FOLDER} folders: choose a file made by TFMQ Save."
        return True
