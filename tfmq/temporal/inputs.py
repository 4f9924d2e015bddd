"""What enters the temporal projections of each architecture, from t and the vectors alone.

The networks add their embeddings up in different ways and then hand the same few tensors to all projections. This file
says how, calling the network's own embedders, so that the tensors are those of a real call bit by bit. Whoever uses it
must not trust it blindly: a newer host may compute them differently (`cache.CachedLayer` compares).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .tib import Tib


class NotCovered(Exception):
    """This call feeds the projections in a way that is not described here; the text says which."""


@dataclass(frozen=True)
class Call:
    """One call of a network. t: float32 [B]. dtype: of the latents as the network gets them. conds: its further keyword
    arguments, converted as the host does. options: the host's transformer options."""

    t: Tensor
    dtype: torch.dtype
    conds: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Projections:
    """modules: expression of the paths of the modules behind the embedding. inputs: (network, call) -> group -> input
    [rows, ..., K]. group: path -> the group whose input this module gets. width: module -> channels of its output."""

    modules: str
    inputs: Callable[[Any, Call], dict[str, Tensor]]
    group: Callable[[str], str] = lambda path: ""
    width: Callable[[Any], int] = lambda module: module.weight.shape[0]


def projections_of(network: nn.Module, tib: Tib) -> tuple[Projections, dict[str, nn.Module]] | None:
    """The projections of a network whose TIB has been found, and path -> module of each; None where there are none
    whose input follows from t and vectors."""
    found = PROJECTIONS.get(tib.architecture)
    if found is None:
        return None
    modules = {p: m for p, m in network.named_modules() if re.fullmatch(found.modules, p)}
    inside = {p for p, on in tib.layers.items() if on in ("t", "t+vector", "per-token t")}
    modules = {p: m for p, m in modules.items() if any(q == p or q.startswith(p + ".") for q in inside)}
    return (found, modules) if modules else None


def _own_embedding(network: nn.Module, name: str = "timestep_embedding") -> Callable[..., Tensor]:
    """The sinusoidal embedding that the network's own file uses."""
    for cls in type(network).__mro__:  # a child may be written in another file
        found = getattr(sys.modules.get(cls.__module__), name, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise NotCovered(f"the network's {name} was not found")


def _refuse(call: Call, *names: str) -> None:
    for name in names:
        if call.conds.get(name) is not None:
            raise NotCovered(f"the call has {name}")


def _unet(network: Any, call: Call) -> dict[str, Tensor]:
    if "emb_patch" in call.options.get("patches", {}):
        raise NotCovered("another node changes the embedding (emb_patch)")
    embedding = _own_embedding(network)(call.t, network.model_channels, repeat_only=False).to(call.dtype)
    emb = network.time_embed(embedding)
    if network.num_classes is not None:
        emb = emb + network.label_emb(call.conds["y"])
    return {"": F.silu(emb)}


def _sd3(network: Any, call: Call) -> dict[str, Tensor]:
    c = network.t_embedder(call.t, dtype=call.dtype)
    y = call.conds.get("y")
    if y is not None and network.y_embedder is not None:
        c = c + network.y_embedder(y)
    return {"": F.silu(c)}


def _flux(network: Any, call: Call) -> dict[str, Tensor]:
    method = call.conds.get("ref_latents_method", getattr(network.params, "default_ref_method", None))
    if call.conds.get("ref_latents") is not None and method == "index_timestep_zero":
        raise NotCovered("reference pictures have a timestep of their own")
    embed = _own_embedding(network)
    vec = network.time_in(embed(call.t, 256).to(call.dtype))
    guidance = call.conds.get("guidance")
    if network.params.guidance_embed and guidance is not None:
        vec = vec + network.guidance_in(embed(guidance, 256).to(call.dtype))
    if network.vector_in is not None:
        y = call.conds.get("y")
        if y is None:
            y = torch.zeros((call.t.shape[0], network.params.vec_in_dim), device=call.t.device, dtype=call.dtype)
        vec = vec + network.vector_in(y[:, : network.params.vec_in_dim])
    return {"": F.silu(vec[:, None, :])}


def _chroma(network: Any, call: Call) -> dict[str, Tensor]:
    embed = _own_embedding(network)
    count, rows, device = 344, call.t.shape[0], call.t.device
    t = embed(call.t.detach().clone(), 16).to(device, call.dtype)
    guidance = embed(call.conds["guidance"].detach().clone(), 16).to(device, call.dtype)
    which = embed(torch.arange(count, device=device), 32).to(device, call.dtype).unsqueeze(0).repeat(rows, 1, 1)
    both = torch.cat([t, guidance], dim=1).unsqueeze(1).repeat(1, count, 1)
    return {"": torch.cat([both, which], dim=-1)}


def _qwen_image(network: Any, call: Call) -> dict[str, Tensor]:
    t = call.t
    references = call.conds.get("ref_latents")
    method = call.conds.get("ref_latents_method", getattr(network, "default_ref_method", None))
    two_times = bool(references) and method == "index_timestep_zero"
    if two_times:  # reference pictures are modulated as at t = 0, by rows of their own
        t = torch.cat([t, t * 0], dim=0)
    like = torch.empty(0, dtype=call.dtype, device=t.device)
    image = network.time_text_embed(t, like, call.conds.get("additional_t_cond"))
    text = image.chunk(2, dim=0)[0] if two_times else image
    return {"image": F.silu(image), "": F.silu(text)}


def _wan(network: Any, call: Call) -> dict[str, Tensor]:
    embed = _own_embedding(network, "sinusoidal_embedding_1d")
    e = network.time_embedding(embed(network.freq_dim, call.t.flatten()).to(dtype=call.dtype))
    return {"": F.silu(e.reshape(call.t.shape[0], -1, e.shape[-1]))}


def _lumina2(network: Any, call: Call) -> dict[str, Tensor]:
    _refuse(call, "ref_contexts", "siglip_feats")
    if call.conds.get("ref_latents"):
        raise NotCovered("reference pictures have a timestep of their own")
    t = network.t_embedder((1.0 - call.t) * network.time_scale, dtype=call.dtype)
    if network.clip_text_pooled_proj is not None:
        pooled = call.conds.get("clip_text_pooled")
        if pooled is None:
            pooled = torch.zeros((t.shape[0], network.clip_text_dim), device=t.device, dtype=call.dtype)
        else:
            pooled = network.clip_text_pooled_proj(pooled)
        t = network.time_text_embed(torch.cat((t, pooled), dim=-1))
    return {"": F.silu(t), "no silu": t}


def _lumina2_group(path: str) -> str:
    # Z-Image has the Linear first in its list, without a SiLU before it.
    return "no silu" if path.endswith("adaLN_modulation.0") else ""


def _pixart(network: Any, call: Call) -> dict[str, Tensor]:
    t = network.t_embedder(call.t, call.dtype)
    size, ratio = call.conds.get("c_size"), call.conds.get("c_ar")
    if network.micro_conditioning and size is not None and ratio is not None:
        rows = call.t.shape[0]
        t = t + torch.cat([network.csize_embedder(size, rows), network.ar_embedder(ratio, rows)], dim=1)
    return {"": F.silu(t)}


def _auraflow(network: Any, call: Call) -> dict[str, Tensor]:
    return {"": F.silu(network.t_embedder(call.t, call.dtype))}


def _hunyuan_video(network: Any, call: Call) -> dict[str, Tensor]:
    _refuse(call, "guiding_frame_index")
    embed = _own_embedding(network)
    vec = network.time_in(embed(call.t, 256, time_factor=1.0).to(call.dtype))
    if network.vector_in is not None:
        vec = vec + network.vector_in(call.conds["y"][:, : network.params.vec_in_dim])
    guidance = call.conds.get("guidance")
    if network.params.guidance_embed and guidance is not None:
        vec = vec + network.guidance_in(embed(guidance, 256).to(call.dtype))
    return {"": F.silu(vec[:, None, :])}


_DOUBLE_SINGLE = r"double_blocks\.\d+\.(img_mod|txt_mod)\.lin|single_blocks\.\d+\.modulation\.lin"
_FLUX_MODULES = (
    _DOUBLE_SINGLE + r"|double_stream_modulation_(img|txt)\.lin|single_stream_modulation\.lin"
    r"|final_layer\.adaLN_modulation\.1"
)

PROJECTIONS: dict[str, Projections] = {
    "unet": Projections(r".*\.emb_layers\.1", _unet),
    "sd3": Projections(
        r"joint_blocks\.\d+\.(context_block|x_block)\.adaLN_modulation\.1|final_layer\.adaLN_modulation\.1", _sd3
    ),
    "flux": Projections(_FLUX_MODULES, _flux),
    # The outputs of its inner layers are many times larger than the result, so it is kept as one piece.
    "chroma": Projections("distilled_guidance_layer", _chroma, width=lambda module: module.out_proj.weight.shape[0]),
    "qwen_image": Projections(
        r"transformer_blocks\.\d+\.(img_mod|txt_mod)\.1|norm_out\.linear",
        _qwen_image,
        lambda path: "image" if ".img_mod." in path else "",
    ),
    "wan": Projections(r"time_projection\.1", _wan),
    "lumina2": Projections(
        r"(layers|noise_refiner)\.\d+\.adaLN_modulation\.[01]|final_layer\.adaLN_modulation\.1",
        _lumina2,
        _lumina2_group,
    ),
    "pixart": Projections(r"t_block\.1", _pixart),
    "auraflow": Projections(r"double_layers\.\d+\.(modC|modX)\.1|single_layers\.\d+\.modCX\.1|modF\.1", _auraflow),
    "hunyuan_video": Projections(_DOUBLE_SINGLE + r"|final_layer\.adaLN_modulation\.1", _hunyuan_video),
}
