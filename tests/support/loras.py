"""Small LoRA files with random factors, in the formats that people train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Lora = dict[str, Tensor]


def kohya(shapes: dict[str, torch.Size], rank: int = 4, seed: int = 0, alpha: float = 2.0, size: float = 0.2) -> Lora:
    """A LoRA in kohya's format. shapes: path in the network -> shape of the weight. size: of dW over that of W."""
    generator = torch.Generator().manual_seed(seed)
    lora: Lora = {}
    for path, shape in shapes.items():
        name, rows = f"lora_unet_{path.replace('.', '_')}", shape[1:].numel()
        down = torch.randn(rank, *shape[1:], generator=generator)
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
        # Weights of the tiny models are about 1 / sqrt(rows).
        lora[f"{name}.lora_down.weight"] = down / rows**0.5
        lora[f"{name}.lora_up.weight"] = up * size * rank**0.5 / alpha
        lora[f"{name}.alpha"] = torch.tensor(alpha)
    return lora


def loha(shapes: dict[str, torch.Size], rank: int = 3, seed: int = 0) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    lora: Lora = {}
    for path, shape in shapes.items():
        name, rows = f"lora_unet_{path.replace('.', '_')}", shape[1:].numel()
        for part in ("w1", "w2"):
            lora[f"{name}.hada_{part}_a"] = 0.3 * torch.randn(shape[0], rank, generator=generator)
            lora[f"{name}.hada_{part}_b"] = torch.randn(rank, rows, generator=generator) / rows**0.25
        lora[f"{name}.alpha"] = torch.tensor(float(rank))
    return lora


def lokr(shapes: dict[str, torch.Size], seed: int = 0) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    lora: Lora = {}
    for path, shape in shapes.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        lora[f"{name}.lokr_w1"] = 0.3 * torch.randn(2, 2, generator=generator)
        inner = torch.randn(shape[0] // 2, shape[1] // 2, *shape[2:], generator=generator)
        lora[f"{name}.lokr_w2"] = 0.1 * inner / shape[1:].numel() ** 0.5
    return lora


def difference(shapes: dict[str, torch.Size], seed: int = 0, size: float = 0.05) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"lora_unet_{path.replace('.', '_')}.diff": size
        * torch.randn(shape, generator=generator)
        / shape[1:].numel() ** 0.5
        for path, shape in shapes.items()
    }


def apply(patcher: Any, lora: Lora, strength: float) -> Any:
    """What the host's Load LoRA node does."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0.0)[0]


def write(lora: Lora, target: Path) -> Path:
    from safetensors.torch import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in lora.items()}, target)
    return target
