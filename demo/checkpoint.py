"""The demo checkpoint in SD1.5 format: stored UNet and decoder weights plus a text encoder drawn from seeds.

`python -m demo.checkpoint` writes it into the cache where it is missing or out of date, and prints its path.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from devkit.paths import CACHE, host_dir

if TYPE_CHECKING:
    from torch import Tensor

MODEL = Path(__file__).resolve().parent / "model"
PARTS = {
    "model.diffusion_model.": MODEL / "shapes-unet.safetensors",
    "first_stage_model.": MODEL / "shapes-decoder.safetensors",
}
TARGET = CACHE / "demo" / "tfmq-shapes-sd15.safetensors"
TEXT_PREFIX = "cond_stage_model.transformer."
# The UNet was trained on the features of exactly this encoder: neither number may change.
FIRST_SEED = 1234
GAIN, POSITION_GAIN = 0.35, 0.3


def ensure() -> Path:
    """The checkpoint's path; assembles it first where its stamp does not fit weights, code and text configuration."""
    config = host_dir() / "comfy" / "sd1_clip_config.json"
    stamp, key = TARGET.with_suffix(".key"), _key([Path(__file__), config, *PARTS.values()])
    if TARGET.is_file() and stamp.is_file() and stamp.read_text() == key:
        return TARGET
    assemble(config, TARGET)
    stamp.write_text(key)
    return TARGET


def assemble(config: Path, target: Path) -> None:
    """Write the whole checkpoint (float16) to `target`; `config` is the host's CLIP-L configuration (JSON)."""
    from safetensors.torch import load_file, save_file

    tensors = {TEXT_PREFIX + name: value for name, value in text_encoder(json.loads(config.read_text())).items()}
    for prefix, file in PARTS.items():
        tensors |= {prefix + name: value for name, value in load_file(file).items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def text_encoder(config: dict) -> dict[str, Tensor]:
    """CLIP-L's tensors (float16) by name, each drawn from a generator of its own.

    The seed of a tensor is FIRST_SEED plus its place in the sorted names. Norms start as identities, biases at zero,
    the projection is the identity; matrices are Gaussian with deviation 0.35 / sqrt(inputs), token embeddings 1,
    position embeddings 0.3.
    """
    import torch

    tensors = {}
    for place, (name, shape) in enumerate(sorted(_shapes(config).items())):
        if len(shape) == 1:
            value = torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
        elif name == "text_projection.weight":
            value = torch.eye(shape[0])
        else:
            value = torch.randn(shape, generator=torch.Generator().manual_seed(FIRST_SEED + place))
            if "position_embedding" in name:
                value = value * POSITION_GAIN
            elif "token_embedding" not in name:
                value = value * GAIN / shape[1] ** 0.5
        tensors[name] = value.half()
    return tensors


def _shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the host's CLIPTextModel."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
        "text_model.embeddings.token_embedding.weight": (config["vocab_size"], width),
        "text_projection.weight": (width, width),
    }
    linears = dict.fromkeys((f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), (width, width))
    linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    norms = ["text_model.final_layer_norm"]
    for layer in range(config["num_hidden_layers"]):
        path = f"text_model.encoder.layers.{layer}."
        norms += [path + "layer_norm1", path + "layer_norm2"]
        for name, shape in linears.items():
            shapes |= {f"{path}{name}.weight": shape, f"{path}{name}.bias": shape[:1]}
    for norm in norms:
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    return shapes


def _key(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


if __name__ == "__main__":
    print(ensure())
