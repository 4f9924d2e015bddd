"""The float type between the integer layers on a CPU, which the host chooses and the person can change."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher

from ...kernels.onednn import fast_bfloat16


def advice(patcher: ModelPatcher) -> str:
    """A sentence where this MODEL would run faster in bfloat16, else nothing.

    On a CPU the host computes in float32 unless it is told otherwise: twice the memory traffic between the integer
    layers, and attention without the processor's bfloat16 products.
    """
    if torch.device(patcher.load_device).type != "cpu" or not fast_bfloat16():
        return ""
    dtype = patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()
    if dtype == torch.bfloat16:
        return ""
    return (
        f"between the integer layers this MODEL computes in {str(dtype).removeprefix('torch.')}; this processor is "
        "faster in bfloat16: start ComfyUI with --bf16-unet, or put the node ModelComputeDtype (bf16) behind this one"
    )
