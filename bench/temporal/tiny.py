"""Tiny instances of ComfyUI's model classes, with random weights and inputs that fit: for checks that run a model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.temporal.models import build

_UNET = dict(
    image_size=32,
    use_spatial_transformer=True,
    legacy=False,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    num_res_blocks=[1, 1],
    channel_mult=[1, 2],
    transformer_depth=[1, 1],
    transformer_depth_middle=1,
    transformer_depth_output=[1] * 4,
    context_dim=24,
    use_temporal_attention=False,
    use_temporal_resblock=False,
)
_SD3 = dict(
    in_channels=4,
    out_channels=4,
    depth=2,
    num_patches=64,
    pos_embed_max_size=8,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 128}},
)
_FLUX = dict(
    in_channels=4,
    out_channels=4,
    patch_size=2,
    hidden_size=32,
    num_heads=2,
    axes_dim=[4, 6, 6],
    theta=100,
    mlp_ratio=2.0,
    qkv_bias=True,
    depth=2,
    depth_single_blocks=2,
    context_in_dim=24,
    vec_in_dim=20,
    txt_ids_dims=[],
)
_WAN = dict(
    model_type="t2v", dim=32, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_dim=24, in_dim=4, out_dim=4
)
_LUMINA = dict(
    in_channels=4, dim=64, n_layers=2, n_heads=2, n_kv_heads=2, axes_dims=[16, 8, 8], cap_feat_dim=24, qk_norm=True
)
_PIXART = dict(
    in_channels=4, hidden_size=48, depth=2, num_heads=2, caption_channels=24, model_max_length=5, pe_interpolation=1
)
_HUNYUAN_DIT = dict(
    hidden_size=32, depth=4, num_heads=2, text_states_dim=24, text_states_dim_t5=16, text_len=5, text_len_t5=7
)
_HUNYUAN_VIDEO = dict(
    _FLUX,
    patch_size=[1, 2, 2],
    byt5=False,
    meanflow=False,
    meanflow_sum=False,
    use_cond_type_embedding=False,
    vision_in_dim=None,
)
del _HUNYUAN_VIDEO["txt_ids_dims"]


@dataclass(frozen=True)
class Tiny:
    """architecture and config: as in `models.MODELS`. x: shape of the latents without the batch.

    t: shape of t without the batch; scale: largest t. vector, text: shapes (without the batch) of further inputs by the
    keyword that the model takes. fixed: further arguments, made from the batch size.
    """

    architecture: str
    config: dict[str, Any]
    x: tuple[int, ...] = (4, 8, 8)
    t: tuple[int, ...] = ()
    scale: float = 1.0
    vector: dict[str, tuple[int, ...]] = field(default_factory=dict)
    text: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fixed: Callable[[int], dict[str, Any]] = lambda batch: {}


TINY: dict[str, Tiny] = {
    "SD1.5": Tiny("unet", dict(_UNET, num_heads=2), scale=999),
    "SDXL": Tiny(
        "unet",
        dict(_UNET, num_head_channels=16, use_linear_in_transformer=True, num_classes="sequential", adm_in_channels=20),
        scale=999,
        vector={"y": (20,)},
    ),
    "SD3": Tiny("sd3", dict(_SD3, adm_in_channels=20), scale=1000, vector={"y": (20,)}),
    "SD3.5-medium": Tiny(
        "sd3",
        dict(_SD3, adm_in_channels=20, qk_norm="rms", x_block_self_attn_layers=[0]),
        scale=1000,
        vector={"y": (20,)},
    ),
    "Flux.1-dev": Tiny("flux", dict(_FLUX, guidance_embed=True), vector={"y": (20,), "guidance": ()}),
    "Flux.1-schnell": Tiny("flux", dict(_FLUX, guidance_embed=False), vector={"y": (20,)}),
    "Flux.2-dev": Tiny(
        "flux",
        dict(
            {**_FLUX, "vec_in_dim": None, "qkv_bias": False},
            guidance_embed=True,
            global_modulation=True,
            mlp_silu_act=True,
        ),
        vector={"guidance": ()},
    ),
    "Flux.2 without guidance": Tiny(
        "flux", dict({**_FLUX, "vec_in_dim": None}, guidance_embed=False, global_modulation=True, mlp_silu_act=True)
    ),
    "Chroma": Tiny(
        "chroma",
        dict(
            {**_FLUX, "vec_in_dim": None, "in_channels": 16, "out_channels": 16},
            in_dim=64,
            out_dim=32,
            hidden_dim=32,
            n_layers=2,
        ),
        vector={"guidance": ()},
    ),
    "Qwen-Image": Tiny(
        "qwen_image",
        dict(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
        ),
        x=(4, 1, 8, 8),
    ),
    "Wan2.1": Tiny("wan", _WAN, x=(4, 1, 8, 8), scale=1000),
    "Wan2.2-5B": Tiny("wan", dict(_WAN, in_dim=48, out_dim=48), x=(48, 3, 4, 4), t=(3,), scale=1000),
    "Lumina2": Tiny("lumina2", _LUMINA, fixed=lambda batch: {"num_tokens": 5}),
    "NewBie": Tiny(
        "lumina2",
        dict(_LUMINA, clip_text_dim=20),
        vector={"clip_text_pooled": (20,)},
        fixed=lambda batch: {"num_tokens": 5},
    ),
    "Z-Image": Tiny(
        "lumina2",
        dict(
            _LUMINA, dim=256, axes_dims=[64, 32, 32], z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=8
        ),
        fixed=lambda batch: {"num_tokens": 5},
    ),
    "PixArt-Sigma": Tiny("pixart", dict(_PIXART, micro_condition=False), x=(4, 48, 48), scale=999),
    "PixArt-Alpha": Tiny(
        "pixart", dict(_PIXART, micro_condition=True), x=(4, 48, 48), scale=999, vector={"c_size": (2,), "c_ar": (1,)}
    ),
    "AuraFlow": Tiny(
        "auraflow",
        dict(dim=32, n_heads=2, global_conddim=32, cond_seq_dim=24, max_seq=64, n_layers=3, n_double_layers=1),
    ),
    "HunyuanDiT 1.2": Tiny(
        "hunyuan_dit",
        _HUNYUAN_DIT,
        scale=999,
        text={"encoder_hidden_states_t5": (7, 16)},
        fixed=lambda batch: {
            "text_embedding_mask": torch.ones(batch, 5),
            "text_embedding_mask_t5": torch.ones(batch, 7),
        },
    ),
    "HunyuanDiT 1.1": Tiny(
        "hunyuan_dit",
        dict(_HUNYUAN_DIT, size_cond=True),
        scale=999,
        vector={"image_meta_size": (6,)},
        text={"encoder_hidden_states_t5": (7, 16)},
        fixed=lambda batch: {
            "text_embedding_mask": torch.ones(batch, 5),
            "text_embedding_mask_t5": torch.ones(batch, 7),
        },
    ),
    "HunyuanVideo": Tiny(
        "hunyuan_video",
        dict(_HUNYUAN_VIDEO, guidance_embed=True),
        x=(4, 1, 8, 8),
        scale=1000,
        vector={"y": (20,), "guidance": ()},
    ),
}


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights of a sensible size, none of them zero (zeros would hide what a layer depends on)."""
    noise = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=noise)
            tensor.data.copy_(values * tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.5 + 0.2 * values)


def tiny_model(name: str, seed: int = 0) -> torch.nn.Module:
    """A float32 model on the CPU, filled with random weights."""
    tiny = TINY[name]
    model = build(tiny.architecture, device="cpu", dtype=torch.float32, **tiny.config).eval().requires_grad_(False)
    fill(model, seed)
    return model


def tiny_inputs(name: str, batch: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    """x, t (half of its scale, different in each row), context (batch, 5, 24) and the further tensors, by keyword."""
    tiny = TINY[name]
    noise = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=noise)

    t = (0.4 + 0.2 * torch.rand(batch, *tiny.t, generator=noise)) * tiny.scale
    more = {**tiny.vector, **tiny.text}
    return {"x": draw(*tiny.x), "t": t, "context": draw(5, 24), **{key: draw(*shape) for key, shape in more.items()}}


def tiny_run(name: str, model: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """A function of (x, t, context, **further tensors) that runs the model as ComfyUI would."""
    tiny = TINY[name]

    def run(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return model(x, t, context=context, transformer_options={}, **tiny.fixed(x.shape[0]), **more)

    return run
