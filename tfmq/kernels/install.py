"""What a person can install so that a quantized model gets a faster backend."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch

from . import kitchen
from .rates import no_int8
from .triton import backend as triton_backend

SLOWER = {"kitchen", "int_mm", "float_conv", "float_product", "reference"}  # on a GPU, than with Triton


def advice(device: torch.device | str, backends: Mapping[str, Mapping[str, int]]) -> str:
    """A sentence, or nothing where nothing would help.

    backends: operation -> backend -> layers that got it.
    """
    device = torch.device(device)
    got = {name for counts in backends.values() for name in counts}
    if device.type == "cpu":
        if "reference" in got and not hasattr(torch, "_int_mm"):
            return "for faster layers install a newer PyTorch: this one has no integer matrix product"
        return ""
    if not got & SLOWER or no_int8(device) is not None:
        return ""
    sentences = []
    reason = triton_backend.unusable()
    if reason is not None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        sentences.append(
            "for faster layers install Triton for this PyTorch into ComfyUI's Python "
            f"(python -m pip install {package}): {reason}"
        )
    if reason is not None and kitchen.unusable() is not None and _cuda() < (13,):
        sentences.append(
            "without Triton, a PyTorch for CUDA 13 lets Linear layers use the int8 kernels that come with ComfyUI"
        )
    return "\n".join(sentences)


def _cuda() -> tuple[int, ...]:
    """Version of CUDA that PyTorch was made for; (0,) for none."""
    return tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
