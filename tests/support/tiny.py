"""Tiny checkpoints with random weights that ComfyUI's own loaders recognise, built with its own model classes.

They are kept in `.cache/tiny` and are the same on every machine with the same torch.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from devkit import inprocess
from devkit.paths import CACHE

FOLDER = CACHE / "tiny"
VERSION = 1  # counts up when weights or models change

UNET = {
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "model_channels": 320,
}


@dataclass(frozen=True)
class Tiny:
    """One tiny model: how it is built, how the host loads it, what conditioning and latent it takes."""

    name: str
    kind: str  # folder under models/
    prefix: str  # of the keys in the file
    build: Callable[[dict[str, Any]], nn.Module]
    millions: float  # parameters
    width: int  # of the text conditioning
    pooled: int = 0  # width of the pooled text, 0 for none
    latent: str = "EmptyLatentImage"  # node class that makes a latent for it
    size: int = 64  # side of a small picture, pixels
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The checkpoint; built where it is missing."""
        target = FOLDER / f"tiny-{self.name}-v{VERSION}.safetensors"
        if not target.is_file():
            write(self, target)
        return target

    @property
    def loader(self) -> dict[str, Any]:
        """The host's loader node for it, in API format (output 0 is the MODEL)."""
        if self.kind == "checkpoints":
            return {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": self.path.name}}
        return {"class_type": "UNETLoader", "inputs": {"unet_name": self.path.name, "weight_dtype": "default"}}

    @property
    def empty_latent(self) -> dict[str, Any]:
        """A node, in API format, that makes an empty latent of one small picture."""
        size = {"width": self.size, "height": self.size, "batch_size": 1}
        return {"class_type": self.latent, "inputs": size | ({"length": 1} if "Video" in self.latent else {})}

    def conditioning(self, seed: int, tokens: int = 7) -> dict[str, Any]:
        """A node, in API format, that makes a random CONDITIONING of the widths of this model."""
        inputs = {"seed": seed, "tokens": tokens, "width": self.width, "pooled": self.pooled}
        return {"class_type": "TFMQTest_RandomConditioning", "inputs": inputs}


def _unet(**config: Any) -> Callable[[dict[str, Any]], nn.Module]:
    def build(where: dict[str, Any]) -> nn.Module:
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        return UNetModel(**UNET, **config, **where)

    return build


def _flux(where: dict[str, Any]) -> nn.Module:
    from comfy.ldm.flux.model import Flux

    return Flux(
        image_model="flux", in_channels=16, out_channels=16, patch_size=2, hidden_size=128, num_heads=1, mlp_ratio=4.0,
        depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, context_in_dim=64, vec_in_dim=32,
        qkv_bias=True, guidance_embed=True, txt_ids_dims=[], **where,
    )  # fmt: skip


def _sd3(where: dict[str, Any]) -> nn.Module:
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}}
    return OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, out_channels=16, depth=2, adm_in_channels=32,
        context_embedder_config=embedder, num_patches=256, pos_embed_max_size=16, pos_embed_scaling_factor=None,
        **where,
    )  # fmt: skip


def _wan(where: dict[str, Any]) -> nn.Module:
    from comfy.ldm.wan.model import WanModel

    return WanModel(
        model_type="t2v", dim=128, num_heads=1, ffn_dim=256, num_layers=2, in_dim=16, out_dim=16, text_dim=64,
        freq_dim=256, image_model="wan2.1", **where,
    )  # fmt: skip


SD15 = Tiny(
    "sd15", "checkpoints", "model.diffusion_model.",
    _unet(
        num_res_blocks=[1], channel_mult=[1], transformer_depth=[1], transformer_depth_output=[0, 0],
        transformer_depth_middle=-2, num_heads=8, context_dim=768, use_linear_in_transformer=False,
    ),
    13.64, width=768,
)  # fmt: skip
SD15_TWO_LEVEL = Tiny(
    "sd15-two-level", "checkpoints", "model.diffusion_model.",
    _unet(
        num_res_blocks=[1, 1], channel_mult=[1, 1], transformer_depth=[1, 0], transformer_depth_output=[1, 1, 0, 0],
        transformer_depth_middle=-1, num_heads=8, context_dim=768, use_linear_in_transformer=False,
    ),
    31.85, width=768,
)  # fmt: skip
SDXL = Tiny(
    "sdxl", "checkpoints", "model.diffusion_model.",
    _unet(
        num_classes="sequential", adm_in_channels=2816, context_dim=2048, num_head_channels=64,
        use_linear_in_transformer=True, num_res_blocks=[1, 1, 1], channel_mult=[1, 1, 1], transformer_depth=[0, 2, 5],
        transformer_depth_output=[0] * 6, transformer_depth_middle=-2,
    ),
    60.6, width=2048, pooled=1280,
)  # fmt: skip
FLUX = Tiny("flux", "diffusion_models", "", _flux, 1.02, width=64, pooled=32, latent="EmptySD3LatentImage")
SD3 = Tiny("sd3", "diffusion_models", "", _sd3, 1.10, width=64, pooled=32, latent="EmptySD3LatentImage")
WAN = Tiny(
    "wan", "diffusion_models", "", _wan, 0.59, width=64, latent="EmptyHunyuanLatentVideo",
    metadata={"config": json.dumps({"transformer": {"text_dim": 64}})},
)  # fmt: skip

ALL = (SD15, SD15_TWO_LEVEL, SDXL, FLUX, SD3, WAN)


def build(tiny: Tiny) -> nn.Module:
    """The bare network on the CPU in float32, with its random weights."""
    inprocess.use_host()
    import comfy.ops

    network = tiny.build({"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init})
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            # A seed of its own for every tensor: adding a layer does not change the others.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{tiny.name} {name}".encode()))
            tensor.copy_(_values(name, tensor.shape, generator))
    return network.eval()


def write(tiny: Tiny, target: Path) -> None:
    """Write a float16 checkpoint of `tiny`."""
    from safetensors.torch import save_file

    tensors = {tiny.prefix + key: value.half().contiguous() for key, value in build(tiny).state_dict().items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata=tiny.metadata or None)
    os.replace(temporary, target)


def _values(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Norm gains about 1, biases small, matrices such that unit inputs give outputs of about unit size."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.02 * noise if name.endswith("bias") else 1 + 0.1 * noise
    if len(shape) == 3:  # tables that are added: Wan's modulation, SD3's positions
        return 0.1 * noise
    return noise / float(noise[0].numel()) ** 0.5
