"""Pictures of a MODEL in this process: what is loaded, which prompts are sampled, how ours is calibrated."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.quality.kept import calibrations_in
from demo.adapt import SAMPLING, SIZE
from devkit.paths import ROOT

PROMPTS = ROOT / "demo" / "prompts.txt"
CALIBRATION = 16  # prompts, at most
SEED, CALIBRATION_SEED = 1000, 500_000
BATCH = 8  # prompts per sampler call; the same for every model
DEMO = {"steps": SAMPLING["steps"], "cfg": SAMPLING["cfg"], "size": SIZE}


@dataclass(frozen=True)
class Setting:
    """What is sampled how. `conditionings`: one text conditioning per prompt, `negative`: the empty one."""

    prompts: list[str]
    conditionings: list[Any]
    negative: Any
    steps: int
    cfg: float
    size: int
    vae: Any


def calibrate(pack: ModuleType, model: Any, setting: Setting, conditionings: list[Any]) -> Any:
    """Ours, by the code behind TFMQ Calibrate, with seeds that no tested picture has."""
    module = sys.modules[f"{pack.__name__}.tfmq.host.calibrate"]
    run = module.ksampler_run(
        conditionings, setting.negative, empty_latent(setting.size), CALIBRATION_SEED, setting.steps, setting.cfg,
        "euler", "normal",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, calibrations_in(Path(folder)):  # made anew, so that it can be timed
        settings = module.Settings((), {"prompts": len(conditionings)})
        handle, _ = module.calibrate(model, run, len(conditionings), setting.steps, 25, settings)
        return handle.load()


def sample(model: Any, setting: Setting) -> Tensor:
    """One picture per prompt, [N, H, W, 3] in 0..1 on the CPU; picture i has seed SEED + i."""
    import comfy.sample

    pictures = []
    start = empty_latent(setting.size)["samples"]
    for indices in batches(setting.conditionings):
        noise = torch.cat([comfy.sample.prepare_noise(start, SEED + i) for i in indices])
        positive = [[torch.cat([setting.conditionings[i][0][0] for i in indices]), {}]]
        latent = comfy.sample.sample(
            model, noise, setting.steps, setting.cfg, "euler", "normal", positive, setting.negative,
            start.expand(len(indices), -1, -1, -1).clone(), disable_pbar=True, seed=SEED,
        )  # fmt: skip
        pictures.append(setting.vae.decode(latent).float().cpu().clamp(0, 1))
    return torch.cat(pictures)


def timesteps(model: Any, steps: int) -> Tensor:
    """What the network is given in a run of `sample`, ascending."""
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)[:-1]
    return sampling.timestep(sigmas).float().sort().values


def batches(conditionings: list[Any]) -> list[list[int]]:
    """Neighbours whose conditionings have the same number of tokens share a call, in the order of the prompts."""
    out: list[list[int]] = []
    for i, conditioning in enumerate(conditionings):
        last = out[-1] if out else None
        if last and len(last) < BATCH and conditionings[last[0]][0][0].shape == conditioning[0][0].shape:
            last.append(i)
        else:
            out.append([i])
    return out


def load(path: Path, text: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a checkpoint; without `text` the MODEL alone.

    dtype: of the MODEL's weights; it computes in them where the device can, float16 on CPUs in float32. CLIP computes
    in float32 on every device. Raises ValueError for a checkpoint that is not in SD1.5 format.
    """
    import comfy.sd

    model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=text, output_clip=text, model_options={"dtype": dtype},
        te_model_options={"dtype": torch.float32},
    )  # fmt: skip
    if text and (clip is None or vae is None):
        raise ValueError(f"{path.name} has no text encoder or no VAE: give a complete SD1.5-format checkpoint.")
    if model.model.adm_channels or model.model.latent_format.latent_channels != 4:
        kind = type(model.model.model_config).__name__
        raise ValueError(f"{path.name} is a checkpoint of kind {kind}: give one in SD1.5 format.")
    return model, clip, vae


def in_float16(path: Path, model: Any) -> Any:
    """A MODEL of the same checkpoint whose weights are those of `model` rounded to float16."""
    rounded, _, _ = load(path, text=False, dtype=torch.float16)
    weights = dict(model.model.diffusion_model.named_parameters())
    for name, weight in rounded.model.diffusion_model.named_parameters():
        weight.copy_(weights[name])
    return rounded


def encode(clip: Any, text: str) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def empty_latent(size: int) -> dict[str, Any]:
    return {"samples": torch.zeros(1, 4, size // 8, size // 8)}


def read_prompts(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = list(dict.fromkeys(line for line in lines if line))
    if len(prompts) < 2:
        raise ValueError(f"{path} holds {len(prompts)} prompts: give a text file with at least 2, one per line.")
    return prompts


def split(prompts: list[str], count: int) -> tuple[list[str], list[str]]:
    """The prompts to test, and those to calibrate on: the last of the others, or the first tested ones."""
    tested, others = prompts[:count], prompts[count:]
    return tested, others[-CALIBRATION:] or tested[:CALIBRATION]


def say(text: str) -> None:
    print(text, flush=True)
