"""Attention of a quantized MODEL on a CPU, where the host's own choice costs more than all the layers together.

Without `--use-pytorch-cross-attention` the host computes attention on a CPU in chunks ("sub quadratic") or in halves
("split") and writes every score to memory. torch's own kernel keeps them in the cache:
docs/decisions/attention-on-a-cpu.md has the times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.modules import attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...runtime.key_padding import whole_vectors

KEY = "optimized_attention_override"
# The host's ways that the faster one replaces; what a person chose by an argument or a node is none of them.
SLOWER = ("attention_sub_quad", "attention_split", "attention_basic")
FASTER = "attention_pytorch"
ARGUMENTS = "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape"


def faster_attention(func: Callable[..., Tensor], q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The host's override: the attention that it is about to call, then that one's arguments."""
    named = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    if q.device.type != "cpu" or named.get("mask") is not None or func.__name__ not in (*SLOWER, FASTER):
        return func(q, *args, **kwargs)
    run = func if func.__name__ == FASTER else attention.attention_pytorch
    k, v = named["k"], named["v"]
    # Without skip_reshape the host also takes k and v with their heads apart, whose last dimensions but one those are.
    if q.dim() == k.dim() == v.dim() == (4 if named.get("skip_reshape") else 3):
        padded = whole_vectors(q, k, v)
        if padded is not None:
            named["k"], named["v"], named["mask"] = padded
    return run(q, **named)


def attach(patcher: ModelPatcher) -> None:
    """Give a MODEL that runs on a CPU the faster attention, unless somebody gave it another one."""
    if torch.device(patcher.load_device).type == "cpu":
        patcher.model_options["transformer_options"].setdefault(KEY, faster_attention)
