"""Where each architecture keeps its Temporal Information Block (TIB): data only.

The term and the idea that these modules see only the timestep are from TFMQ-DM (Huang et al., CVPR 2024, section 3.2).

A rule is a pair of a regular expression and a dependency. The expression is matched (from the start) against full
parameter names inside the diffusion model, and against `<layer path>.` for layers. The first rule that matches wins.
The dependencies say which inputs move the output:

| dependency | output depends on |
|---|---|
| `t` | the timestep alone |
| `vector` | pooled text, guidance or size, not on t |
| `t+vector` | t and such a vector |
| `text` | text tokens that the network pools itself into one row per sample, not on t |
| `t+text` | t and such pooled tokens (and the vector, where there is one) |
| `per-token t` | t, which may have one value per token or frame instead of one per sample |

In the table `t+vector` means "behind the sum of t and vector": it becomes `t` in a model that has no vector branch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    name: our name of the architecture.
    classes: class names of the diffusion model that this row is for.
    requires: module or parameter paths that must all exist (a class name alone is not unique).
    rules: (regular expression, dependency) pairs, see the module's text.
    first, last: path of the layer that reads the latents, and of the one that writes the prediction.
    vector: expressions of layers that bring a vector in; without any of them `t+vector` becomes `t`.
    excludes: paths that make the rules wrong; a model that has one gets no TIB from this table.
    per_token: (layer path, number of input channels) of a variant whose t may have one value per token.
    """

    name: str
    classes: tuple[str, ...]
    requires: tuple[str, ...]
    rules: tuple[tuple[str, str], ...]
    first: str
    last: str
    vector: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    per_token: tuple[str, int] | None = None


_FLUX_VECTOR = ((r"guidance_in\.", "vector"), (r"vector_in\.", "vector"))

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(  # SD1.x, SD2.x, SDXL and their refiners, inpainting and video children
        name="unet",
        classes=("UNetModel",),
        requires=("time_embed.0", "input_blocks.0.0", "out.2"),
        rules=(
            (r"time_embed\.", "t"),
            (r"label_emb\.", "vector"),
            (r"(input_blocks|middle_block|output_blocks)\..*\bemb_layers\.", "t+vector"),
        ),
        first="input_blocks.0.0",
        last="out.2",
        vector=(r"label_emb\.",),
    ),
    Architecture(
        name="sd3",
        classes=("OpenAISignatureMMDITWrapper", "MMDiT"),
        requires=(
            "t_embedder.mlp.0",
            "joint_blocks.0.x_block.adaLN_modulation.1",
            "x_embedder.proj",
            "final_layer.linear",
        ),
        rules=(
            (r"t_embedder\.", "t"),
            (r"y_embedder\.", "vector"),
            (r"joint_blocks\.\d+\.(context_block|x_block)\.adaLN_modulation\.", "t+vector"),
            (r"final_layer\.adaLN_modulation\.", "t+vector"),
        ),
        first="x_embedder.proj",
        last="final_layer.linear",
        vector=(r"y_embedder\.",),
    ),
    Architecture(  # Flux.1, Flux.2 (modulation shared by all blocks) and children
        name="flux",
        classes=("Flux",),
        requires=("time_in.in_layer", "img_in", "final_layer.linear"),
        rules=(
            (r"time_in\.", "t"),
            *_FLUX_VECTOR,
            (r"double_blocks\.\d+\.(img_mod|txt_mod)\.lin\.", "t+vector"),
            (r"single_blocks\.\d+\.modulation\.lin\.", "t+vector"),
            (r"double_stream_modulation_(img|txt)\.lin\.", "t+vector"),
            (r"single_stream_modulation\.lin\.", "t+vector"),
            (r"final_layer\.adaLN_modulation\.", "t+vector"),
        ),
        first="img_in",
        last="final_layer.linear",
        vector=(r"guidance_in\.", r"vector_in\."),
    ),
    Architecture(  # one small network makes every modulation from t, guidance and the index of the modulation
        name="chroma",
        classes=("Chroma",),
        requires=("distilled_guidance_layer.in_proj", "img_in", "final_layer.linear"),
        rules=((r"distilled_guidance_layer\.", "t+vector"),),
        first="img_in",
        last="final_layer.linear",
        vector=(r"distilled_guidance_layer\.in_proj\.",),
    ),
    Architecture(
        name="qwen_image",
        classes=("QwenImageTransformer2DModel",),
        requires=("time_text_embed.timestep_embedder", "img_in", "norm_out.linear", "proj_out"),
        rules=(
            (r"time_text_embed\.addition_t_embedding\.", "vector"),
            (r"time_text_embed\.", "t"),
            (r"transformer_blocks\.\d+\.(img_mod|txt_mod)\.", "t+vector"),
            (r"norm_out\.linear\.", "t+vector"),
        ),
        first="img_in",
        last="proj_out",
        vector=(r"time_text_embed\.addition_t_embedding\.",),
    ),
    Architecture(
        name="wan",
        classes=("WanModel",),
        requires=("time_embedding.0", "time_projection.1", "patch_embedding", "head.head", "head.modulation"),
        rules=(
            (r"time_embedding\.", "t"),
            (r"time_projection\.", "t"),
            (r"blocks\.\d+\.modulation$", "t"),
            (r"head\.modulation$", "t"),
        ),
        first="patch_embedding",
        last="head.head",
        per_token=("patch_embedding", 48),  # Wan2.2 TI2V: t times the mask of the frames that are given
    ),
    Architecture(  # Lumina 2, Z-Image; with a pooled projection also NewBie
        name="lumina2",
        classes=("NextDiT",),
        requires=("t_embedder.mlp.0", "x_embedder", "noise_refiner.0.adaLN_modulation", "final_layer.linear"),
        rules=(
            (r"t_embedder\.", "t"),
            (r"clip_text_pooled_proj\.", "vector"),
            (r"time_text_embed\.", "t+vector"),
            (r"(layers|noise_refiner)\.\d+\.adaLN_modulation\.", "t+vector"),
            (r"final_layer\.adaLN_modulation\.", "t+vector"),
        ),
        first="x_embedder",
        last="final_layer.linear",
        vector=(r"clip_text_pooled_proj\.",),
    ),
    Architecture(  # Sigma; with size and aspect ratio also Alpha
        name="pixart",
        classes=("PixArtMS",),
        requires=("t_embedder.mlp.0", "t_block.1", "x_embedder.proj", "final_layer.scale_shift_table"),
        rules=(
            (r"t_embedder\.", "t"),
            (r"(csize_embedder|ar_embedder)\.", "vector"),
            (r"t_block\.", "t+vector"),
            (r"(blocks\.\d+|final_layer)\.scale_shift_table$", "t+vector"),
        ),
        first="x_embedder.proj",
        last="final_layer.linear",
        vector=(r"csize_embedder\.",),
    ),
    Architecture(
        name="auraflow",
        classes=("MMDiT",),
        requires=("t_embedder.mlp.0", "modF.1", "init_x_linear", "final_linear"),
        rules=(
            (r"t_embedder\.", "t"),
            (r"double_layers\.\d+\.(modC|modX)\.", "t"),
            (r"single_layers\.\d+\.modCX\.", "t"),
            (r"modF\.", "t"),
        ),
        first="init_x_linear",
        last="final_linear",
    ),
    Architecture(  # the network pools the T5 tokens itself, so everything behind the sum depends on text
        name="hunyuan_dit",
        classes=("HunYuanDiT",),
        requires=("t_embedder.mlp.0", "extra_embedder.0", "pooler", "x_embedder.proj", "final_layer.linear"),
        rules=(
            (r"t_embedder\.", "t"),
            (r"extra_embedder\.", "text"),
            (r"blocks\.\d+\.default_modulation\.", "t+text"),
            (r"final_layer\.adaLN_modulation\.", "t+text"),
        ),
        first="x_embedder.proj",
        last="final_layer.linear",
    ),
    Architecture(  # the token refiner modulates by t and the mean of the text tokens
        name="hunyuan_video",
        classes=("HunyuanVideo",),
        requires=("time_in.in_layer", "img_in.proj", "txt_in.t_embedder", "final_layer.linear"),
        rules=(
            (r"time_in\.", "t"),
            *_FLUX_VECTOR,
            (r"txt_in\.t_embedder\.", "t"),
            (r"txt_in\.individual_token_refiner\.blocks\.\d+\.adaLN_modulation\.", "t+text"),
            (r"double_blocks\.\d+\.(img_mod|txt_mod)\.lin\.", "t+vector"),
            (r"single_blocks\.\d+\.modulation\.lin\.", "t+vector"),
            (r"final_layer\.adaLN_modulation\.", "t+vector"),
        ),
        first="img_in.proj",
        last="final_layer.linear",
        vector=(r"guidance_in\.", r"vector_in\."),
        excludes=("time_r_in",),  # mean-flow models also read the next sigma of the schedule
    ),
)
