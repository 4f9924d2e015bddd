"""Real model configurations, built on the meta device: what temporal parameters are counted on.

Only ComfyUI's model classes are imported, never its sampling or loading code.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from devkit.inprocess import use_host

_UNET = dict(
    image_size=32,
    use_spatial_transformer=True,
    legacy=False,
    use_checkpoint=False,
    in_channels=4,
    out_channels=4,
    use_temporal_attention=False,
    use_temporal_resblock=False,
)
_SD3 = dict(
    in_channels=16, out_channels=16, patch_size=2, input_size=None, adm_in_channels=2048, pos_embed_scaling_factor=None
)
_FLUX = dict(
    axes_dim=[16, 56, 56],
    num_heads=24,
    mlp_ratio=4.0,
    theta=10000,
    out_channels=16,
    in_channels=16,
    patch_size=2,
    qkv_bias=True,
    txt_ids_dims=[],
    hidden_size=3072,
    context_in_dim=4096,
    vec_in_dim=768,
    depth=19,
    depth_single_blocks=38,
)
_WAN = dict(
    model_type="t2v",
    patch_size=(1, 2, 2),
    freq_dim=256,
    window_size=(-1, -1),
    qk_norm=True,
    cross_attn_norm=True,
    eps=1e-6,
)
_LUMINA = dict(patch_size=2, in_channels=16, qk_norm=True)

CLASSES = {
    "unet": "comfy.ldm.modules.diffusionmodules.openaimodel:UNetModel",
    "sd3": "comfy.ldm.modules.diffusionmodules.mmdit:OpenAISignatureMMDITWrapper",
    "flux": "comfy.ldm.flux.model:Flux",
    "chroma": "comfy.ldm.chroma.model:Chroma",
    "qwen_image": "comfy.ldm.qwen_image.model:QwenImageTransformer2DModel",
    "wan": "comfy.ldm.wan.model:WanModel",
    "lumina2": "comfy.ldm.lumina.model:NextDiT",
    "pixart": "comfy.ldm.pixart.pixartms:PixArtMS",
    "auraflow": "comfy.ldm.aura.mmdit:MMDiT",
    "hunyuan_dit": "comfy.ldm.hydit.models:HunYuanDiT",
    "hunyuan_video": "comfy.ldm.hunyuan_video.model:HunyuanVideo",
}


def _sd3(depth: int, patches: int, **more: Any) -> dict[str, Any]:
    context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}}
    size = dict(depth=depth, num_patches=patches, pos_embed_max_size=round(patches**0.5))
    return {**_SD3, **size, "context_embedder_config": context, **more}


def _wan(dim: int, ffn_dim: int, layers: int, channels: int = 16) -> dict[str, Any]:
    size = dict(dim=dim, ffn_dim=ffn_dim, num_layers=layers, num_heads=dim // 128, in_dim=channels, out_dim=channels)
    return {**_WAN, **size}


# name -> (architecture, arguments of its class)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD1.5": (
        "unet",
        dict(
            _UNET,
            adm_in_channels=None,
            model_channels=320,
            num_res_blocks=[2, 2, 2, 2],
            channel_mult=[1, 2, 4, 4],
            transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
            transformer_depth_middle=1,
            transformer_depth_output=[1] * 9 + [0] * 3,
            use_linear_in_transformer=False,
            context_dim=768,
            num_heads=8,
        ),
    ),
    "SDXL": (
        "unet",
        dict(
            _UNET,
            num_classes="sequential",
            adm_in_channels=2816,
            model_channels=320,
            num_res_blocks=[2, 2, 2],
            channel_mult=[1, 2, 4],
            transformer_depth=[0, 0, 2, 2, 10, 10],
            transformer_depth_middle=10,
            transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
            use_linear_in_transformer=True,
            context_dim=2048,
            num_head_channels=64,
        ),
    ),
    "SD3-medium": ("sd3", _sd3(24, 36864)),
    "SD3.5-medium": ("sd3", _sd3(24, 147456, qk_norm="rms", x_block_self_attn_layers=list(range(13)))),
    "SD3.5-large": ("sd3", _sd3(38, 36864, qk_norm="rms")),
    "Flux.1-dev": ("flux", dict(_FLUX, guidance_embed=True)),
    "Flux.1-schnell": ("flux", dict(_FLUX, guidance_embed=False)),
    "Flux.2-dev": (
        "flux",
        dict(
            axes_dim=[32] * 4,
            num_heads=48,
            mlp_ratio=3.0,
            theta=2000,
            in_channels=128,
            out_channels=128,
            patch_size=1,
            hidden_size=6144,
            context_in_dim=15360,
            vec_in_dim=None,
            depth=8,
            depth_single_blocks=48,
            guidance_embed=True,
            global_modulation=True,
            mlp_silu_act=True,
            qkv_bias=False,
            ops_bias=False,
            txt_ids_dims=[3],
        ),
    ),
    "Chroma1": (
        "chroma",
        dict(
            {**_FLUX, "vec_in_dim": None},
            in_channels=64,
            out_channels=64,
            in_dim=64,
            out_dim=3072,
            hidden_dim=5120,
            n_layers=5,
        ),
    ),
    "Qwen-Image": ("qwen_image", dict(in_channels=64, num_layers=60)),
    "Wan2.1-14B": ("wan", _wan(5120, 13824, 40)),
    "Wan2.1-1.3B": ("wan", _wan(1536, 8960, 30)),
    "Wan2.2-5B": ("wan", _wan(3072, 14336, 30, channels=48)),
    "Z-Image": (
        "lumina2",
        dict(
            _LUMINA,
            dim=3840,
            cap_feat_dim=2560,
            n_layers=30,
            n_heads=30,
            n_kv_heads=30,
            axes_dims=[32, 48, 48],
            axes_lens=[1536, 512, 512],
            rope_theta=256.0,
            ffn_dim_multiplier=8 / 3,
            z_image_modulation=True,
            time_scale=1000.0,
            pad_tokens_multiple=32,
        ),
    ),
    "Lumina2": (
        "lumina2",
        dict(
            _LUMINA,
            dim=2304,
            cap_feat_dim=2304,
            n_layers=26,
            n_heads=24,
            n_kv_heads=8,
            axes_dims=[32, 32, 32],
            axes_lens=[300, 512, 512],
            rope_theta=10000.0,
            ffn_dim_multiplier=4.0,
        ),
    ),
    "PixArt-Sigma": (
        "pixart",
        dict(
            num_heads=16,
            patch_size=2,
            hidden_size=1152,
            in_channels=4,
            depth=28,
            model_max_length=300,
            input_size=128,
            pe_interpolation=2,
            micro_condition=False,
        ),
    ),
    "AuraFlow 0.2": ("auraflow", dict(max_seq=4096, cond_seq_dim=2048, n_double_layers=4, n_layers=36)),
    "HunyuanDiT 1.2": ("hunyuan_dit", dict(depth=40, hidden_size=1408, mlp_ratio=4.3637)),
    "HunyuanVideo": (
        "hunyuan_video",
        dict(
            in_channels=16,
            out_channels=16,
            patch_size=[1, 2, 2],
            vec_in_dim=768,
            context_in_dim=4096,
            hidden_size=3072,
            num_heads=24,
            mlp_ratio=4.0,
            depth=20,
            depth_single_blocks=40,
            axes_dim=[16, 56, 56],
            theta=256,
            qkv_bias=True,
            guidance_embed=True,
            byt5=False,
            meanflow=False,
            meanflow_sum=False,
            use_cond_type_embedding=False,
            vision_in_dim=None,
        ),
    ),
}


def model_class(architecture: str) -> Callable[..., torch.nn.Module]:
    """ComfyUI's class of one architecture. Raises FileNotFoundError where there is no ComfyUI."""
    place, name = CLASSES[architecture].split(":")
    if "comfy.model_management" not in sys.modules:  # later it would come too late to choose the device
        use_host("cuda" if torch.cuda.is_available() else "cpu")
    return getattr(import_module(place), name)


def build(
    architecture: str, device: str = "meta", dtype: torch.dtype = torch.float16, **config: Any
) -> torch.nn.Module:
    """A diffusion model with the host's plain float layers. On the meta device it takes no memory."""
    cls = model_class(architecture)
    return cls(**config, device=device, dtype=dtype, operations=import_module("comfy.ops").disable_weight_init)
