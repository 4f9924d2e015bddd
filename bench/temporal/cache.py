"""The cache section of the temporal benchmark: tiny models sampled with and without TFMQ Temporal Cache, and what the
table would take in the real configurations."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.temporal.models import MODELS, build
from bench.temporal.table import without_weights
from bench.temporal.tiny import TINY, fill
from devkit.inprocess import PACK_MODULE, load_pack

SAMPLERS = ("euler", "heun", "dpmpp_2m_sde", "ddim")
STEPS = 6
CFG = 3.0
# (name, model, steps, distinct rows per step): cond and uncond differ only where a pooled vector tells them apart.
REAL = (("Qwen-Image", 50, 1), ("Flux.1-dev", 30, 1), ("SD3.5-large", 40, 2))


@dataclass(frozen=True)
class Model:
    """supported: class of the host that wraps the network. tiny: name in `tiny.TINY`. config: what differs.
    pooled: width of the pooled text, 0 for none. latent: shape of the latents without the batch."""

    supported: str
    tiny: str
    config: dict[str, Any] = field(default_factory=dict)
    pooled: int = 0
    latent: tuple[int, ...] = (16, 8, 8)


_CHANNELS = {"in_channels": 16, "out_channels": 16}
MODELS_HERE: dict[str, Model] = {
    "SD1.5": Model("SD15", "SD1.5", latent=(4, 8, 8)),
    # The host appends six embedded sizes of 256 values to the pooled text.
    "SDXL": Model("SDXL", "SDXL", {"adm_in_channels": 1280 + 6 * 256}, pooled=1280, latent=(4, 8, 8)),
    "SD3": Model("SD3", "SD3", {**_CHANNELS, "pos_embed_scaling_factor": None}, pooled=20),
    "Flux": Model("Flux", "Flux.1-dev", _CHANNELS, pooled=20),
    "AuraFlow": Model("AuraFlow", "AuraFlow", latent=(4, 8, 8)),
    "Qwen-Image": Model("QwenImage", "Qwen-Image", {"in_channels": 64, "out_channels": 16}, latent=(16, 1, 8, 8)),
    "Chroma": Model("Chroma", "Chroma", {"in_channels": 64, "out_channels": 64}),
    "Wan2.1": Model("WAN21_T2V", "Wan2.1", {"in_dim": 16, "out_dim": 16}, latent=(16, 1, 8, 8)),
    "Lumina2": Model("Lumina2", "Lumina2", _CHANNELS),
    "Z-Image": Model("ZImage", "Z-Image", _CHANNELS),
    "Wan2.2-5B": Model("WAN22_T2V", "Wan2.2-5B", latent=(48, 3, 4, 4)),
    "PixArt-Sigma": Model("PixArtSigma", "PixArt-Sigma", latent=(4, 48, 48)),
    "HunyuanVideo": Model("HunyuanVideo", "HunyuanVideo", _CHANNELS, pooled=20, latent=(16, 1, 8, 8)),
}
BENCH = ("SDXL", "SD3", "Flux", "AuraFlow", "Qwen-Image")


def patcher_of(name: str, seed: int = 0) -> Any:
    """A MODEL with a tiny network of random float32 weights, on the CPU."""
    load_pack()
    supported_models, model_patcher = import_module("comfy.supported_models"), import_module("comfy.model_patcher")
    model = MODELS_HERE[name]
    config = {**TINY[model.tiny].config, **model.config, "dtype": torch.float32}
    cpu = torch.device("cpu")
    supported = getattr(supported_models, model.supported)(config)
    supported.unet_config.update(config)  # the class puts head sizes of its own over them
    base = supported.get_model({}, "")
    fill(base.diffusion_model, seed)
    return model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)


def conditioning(name: str, seed: int) -> list[Any]:
    noise = torch.Generator().manual_seed(seed)
    pooled = MODELS_HERE[name].pooled
    about = {"pooled_output": torch.randn(1, pooled, generator=noise)} if pooled else {}
    return [[torch.randn(1, 5, 24, generator=noise), about]]


def sample(
    patcher: Any, name: str, sampler: str = "euler", steps: int = STEPS, cfg: float = CFG, batch: int = 1, seed: int = 0
) -> torch.Tensor:
    """Latents of one run, from fixed noise and random conditioning."""
    run = import_module("comfy.sample").sample
    shape = (batch, *MODELS_HERE[name].latent)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return run(
            patcher, noise, steps, cfg, sampler, "normal", conditioning(name, 1 + seed), conditioning(name, 2),
            torch.zeros(shape), disable_pbar=True, seed=seed,
        )  # fmt: skip


def with_lora(patcher: Any, paths: list[str], strength: float = 1.0, seed: int = 5) -> Any:
    """A clone with a rank-2 LoRA on layers of the network, through the host's own loader."""
    noise = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for path in paths:
        rows, columns = patcher.model.state_dict()[f"diffusion_model.{path}.weight"].shape[:2]
        state[f"diffusion_model.{path}.lora_up.weight"] = torch.randn(rows, 2, generator=noise) * 0.3
        state[f"diffusion_model.{path}.lora_down.weight"] = torch.randn(2, columns, generator=noise) * columns**-0.5
    return import_module("comfy.sd").load_lora_for_models(patcher, None, state, strength, 0.0)[0]


def cache(checkpoint: Path | None = None, prompts: Path | None = None) -> dict[str, Any]:
    """Section `cache` of the temporal benchmark.

    `<model>`: parameters no longer resident (of how many), bytes of their weights, and for each sampler, without and
    with a LoRA on temporal layers, the largest difference to the uncached model, bytes of the table and the share of
    calls that it answered. `projected`: the same sizes for real configurations, from the network's shapes alone.
    `without_weights`: of tables that are saved instead of the weights (`temporal_table`).
    """
    load_pack()
    host = import_module(f"{PACK_MODULE}.tfmq.host.temporal.cache")
    found: dict[str, Any] = {name: _tiny_entry(host, name) for name in BENCH}
    found["projected"] = {name: projected(name, steps, rows) for name, steps, rows in REAL}
    found["without_weights"] = without_weights(checkpoint, prompts)
    return found


def _tiny_entry(host: Any, name: str) -> dict[str, Any]:
    base = patcher_of(name)
    parameters = sum(p.numel() for p in base.model.diffusion_model.parameters())  # before any are taken out
    cached = host.apply(base, 10**9)
    record = host.require(cached)
    paths = list(record.layers)[:3]
    runs = []
    for lora in (False, True):
        plain = with_lora(base, paths) if lora else base
        table = with_lora(cached, paths) if lora else cached
        for sampler in SAMPLERS:
            record.table.clear()  # each run fills its own
            difference = sample(plain, name, sampler) - sample(table, name, sampler)
            runs.append(
                {
                    "sampler": sampler, "lora": lora, "max_abs_diff": float(difference.abs().max()),
                    "table_bytes": record.table.nbytes, "hit_rate": record.last.hit_rate,
                    "calls": record.last.calls, "bypassed": record.last.bypassed,
                }
            )  # fmt: skip
    return {
        "parameters_not_resident": record.parameters,
        "parameters": parameters,
        "bytes_not_resident": record.nbytes,
        "max_abs_diff": max(run["max_abs_diff"] for run in runs),
        "table_bytes": max(run["table_bytes"] for run in runs),
        "hit_rate": min(run["hit_rate"] for run in runs),
        "runs": runs,
    }


def projected(name: str, steps: int, rows: int) -> dict[str, Any]:
    """Sizes for a real configuration with 16-bit weights and features, counted on the meta device.

    rows: distinct rows per step (a model that sees t alone has one, whatever the batch).
    """
    inputs = import_module(f"{PACK_MODULE}.tfmq.temporal.inputs")
    tib = import_module(f"{PACK_MODULE}.tfmq.temporal.tib")
    architecture, config = MODELS[name]
    network = build(architecture, **config)
    spec, modules = inputs.projections_of(network, tib.find_tib(network))
    weights = sum(p.numel() for module in modules.values() for p in module.parameters())
    values = sum(spec.width(module) for module in modules.values())
    return {
        "parameters_not_resident": weights,
        "parameters": sum(p.numel() for p in network.parameters()),
        "bytes_not_resident": 2 * weights,
        "steps": steps,
        "rows_per_step": rows,
        "table_bytes": 2 * values * steps * rows,
    }
