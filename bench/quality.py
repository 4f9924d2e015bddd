"""How near to float32 do int8 models stay? Ours and the host's formats, on a checkpoint and on its outlier variant.

`python -m bench.quality [--checkpoint FILE] [--prompts FILE] [--device cpu|cuda] [--json FILE] [--count N] [--steps N]
[--cfg X] [--size N]`. Every model samples the same prompts with the same seeds (euler, normal); the pictures are
compared with those of the float32 model. The outlier variant computes the same function as the checkpoint with
activations that are harder to quantize (`bench/outliers.py`).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from demo import adherence, checkpoint, render
from demo.adapt import SAMPLING, SIZE
from devkit import inprocess
from tfmq.report import atomic, metrics

ROOT = Path(__file__).resolve().parent.parent
COUNT, CALIBRATION = 64, 16
SEED, CALIBRATION_SEED = 1000, 500_000
BATCH = 8  # prompts per sampler call; the same for every model
ENTRIES = ("float32", "ours_w8a8", "ours_w8a8_linear", "host_int8", "host_int8_convrot")
DEMO = {"steps": SAMPLING["steps"], "cfg": SAMPLING["cfg"], "size": SIZE}
OTHERS = {"steps": 20, "cfg": 7.0, "size": 512}


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


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    logging.getLogger().setLevel(logging.ERROR)  # the host's own words on loading and moving models
    try:
        result = measure(given)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"bench quality: {error}", file=sys.stderr)
        return 1
    print(table(result))
    if given.json:
        atomic.write_bytes(given.json, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
        print(f"written: {given.json}")
    return 0


@torch.inference_mode()  # as in the host
def measure(given: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark; a dict that strict JSON can hold."""
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here: run with --device cpu.")
    tested, calibration = split(read_prompts(given.prompts), given.count)
    inprocess.use_host(given.device)
    pack = inprocess.load_pack()
    from .outliers import add_outliers

    is_demo = given.checkpoint.resolve() == checkpoint.TARGET.resolve()
    for name, value in (DEMO if is_demo else OTHERS).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    model, clip, vae = load(given.checkpoint)
    say(f"encoding {len(tested)} + {len(calibration)} prompts")
    encoded = [encode(clip, text) for text in tested]
    setting = Setting(tested, encoded, encode(clip, ""), given.steps, given.cfg, given.size, vae)
    conditionings = [encode(clip, text) for text in calibration]
    disjoint = not set(calibration) & set(tested)
    result: dict[str, Any] = {
        "checkpoint": given.checkpoint.name,
        "prompts": len(tested),
        "calibration_prompts": {"count": len(calibration), "among_the_tested": not disjoint},
        "sampling": {
            "sampler": "euler",
            "scheduler": "normal",
            "steps": given.steps,
            "cfg": given.cfg,
            "size": given.size,
            "first_seed": SEED,
        },
        "machine": machine(given.device),
        "host_version": host_version(),
        "torch": torch.__version__,
        "lpips": metrics.lpips_unavailable_reason() or "measured",
    }
    requests = [render.parse(prompt) for prompt in tested] if is_demo else None
    found, plain = entries("checkpoint", pack, model, setting, conditionings, requests)
    result |= found
    del model
    variant, _, _ = load(given.checkpoint, text=False)
    scaled = add_outliers(variant.model.diffusion_model)
    result["outliers"], pictures = entries("outliers", pack, variant, setting, conditionings, requests)
    result["outlier_variant"] = {
        "tensors": len(scaled),
        "scaled_channels": sum(scaled.values()),
        # How exactly the rescaling preserves the function: the variant's float32 pictures against the checkpoint's.
        "float32_psnr_db_against_checkpoint": finite(metrics.psnr(plain, pictures)),
    }
    return result


def entries(
    variant: str,
    pack: ModuleType,
    model: Any,
    setting: Setting,
    calibration: list[Any],
    requests: list[render.Request] | None,
) -> tuple[dict[str, Any], Tensor]:
    """All five models of one float model: their figures, and the pictures of float32."""
    from .host_formats import int8_model, stored_bytes

    say(f"{variant}: float32")
    started = time.perf_counter()
    reference = sample(model, setting)
    found = {"float32": figures(reference, reference, stored_bytes(model), 0.0, requests)}
    say(f"{variant}: float32 in {time.perf_counter() - started:.0f} s; calibrating on {len(calibration)} prompts")

    started = time.perf_counter()
    calibrated = calibrate(pack, model, setting, calibration)
    calibrating = time.perf_counter() - started
    swap, scheme = sys.modules[f"{pack.__name__}.tfmq.host.swap"], sys.modules[f"{pack.__name__}.tfmq.scheme"]

    def ours(name: str) -> Any:
        return swap.quantize(model, calibrated, scheme.PRESETS[name], lambda *_: None)

    def hosts(rotated: bool) -> Any:
        return int8_model(model, linears, rotated)

    makers: dict[str, tuple[Callable[[], Any], float]] = {
        "ours_w8a8": (lambda: ours("W8A8"), calibrating),
        "ours_w8a8_linear": (lambda: ours("W8A8 Linear only"), calibrating),
        "host_int8": (lambda: hosts(False), 0.0),
        "host_int8_convrot": (lambda: hosts(True), 0.0),
    }
    linears: list[str] = []
    for name, (make, before) in makers.items():
        started = time.perf_counter()
        quantized = make()
        seconds = before + time.perf_counter() - started
        if name.startswith("ours"):
            kinds = swap.require_quantized(quantized).kinds
            linears = [path for path, kind in kinds.items() if kind == "linear"]
        pictures = sample(quantized, setting)
        found[name] = figures(reference, pictures, stored_bytes(quantized), seconds, requests)
        say(f"{variant}: {name}: {found[name]['psnr_db']} dB")
    return found, reference


def figures(
    reference: Tensor, pictures: Tensor, size: int, seconds: float, requests: list[render.Request] | None
) -> dict[str, Any]:
    """One entry. psnr_db is None where the pictures are identical."""
    compared = metrics.compare(reference, pictures)
    entry: dict[str, Any] = {
        "psnr_db": finite(compared["psnr_db"]),
        "psnr_db_worst": finite(min(one["psnr_db"] for one in compared["per_image"])),
        "ssim": round(compared["ssim"], 6),
    }
    if compared["lpips"] is not None:
        entry["lpips"] = round(compared["lpips"], 6)
    if requests is not None:
        entry["adherence"] = round(adherence.mean_score([p.numpy() for p in pictures], requests), 6)
    return entry | {"bytes": size, "seconds": round(seconds, 2)}


def calibrate(pack: ModuleType, model: Any, setting: Setting, conditionings: list[Any]) -> Any:
    """Ours, by the code behind TFMQ Calibrate, with seeds that no tested picture has."""
    import folder_paths

    module = sys.modules[f"{pack.__name__}.tfmq.host.calibrate"]
    run = module.ksampler_run(
        conditionings, setting.negative, empty_latent(setting.size), CALIBRATION_SEED, setting.steps, setting.cfg,
        "euler", "normal",
    )  # fmt: skip
    known = folder_paths.folder_names_and_paths[module.FOLDER]
    with tempfile.TemporaryDirectory() as folder:
        # Not beside the person's own calibrations, and made anew each time so that it can be timed.
        folder_paths.folder_names_and_paths[module.FOLDER] = ([folder], known[1])
        try:
            settings = module.Settings((), {"prompts": len(conditionings)})
            handle, _ = module.calibrate(model, run, len(conditionings), setting.steps, 25, settings)
            return handle.load()
        finally:
            folder_paths.folder_names_and_paths[module.FOLDER] = known


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


def load(path: Path, text: bool = True) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a checkpoint; without `text` the MODEL alone.

    MODEL and CLIP compute in float32 on every device. Raises ValueError for a checkpoint that is not in SD1.5 format.
    """
    import comfy.sd

    model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=text, output_clip=text, model_options={"dtype": torch.float32},
        te_model_options={"dtype": torch.float32},
    )  # fmt: skip
    if text and (clip is None or vae is None):
        raise ValueError(f"{path.name} has no text encoder or no VAE: give a complete SD1.5-format checkpoint.")
    if model.model.adm_channels or model.model.latent_format.latent_channels != 4:
        kind = type(model.model.model_config).__name__
        raise ValueError(f"{path.name} is a checkpoint of kind {kind}: give one in SD1.5 format.")
    return model, clip, vae


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


def finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def host_version() -> str:
    import comfyui_version

    return comfyui_version.__version__


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{result['prompts']} prompts, {result['sampling']['steps']} steps, {result['machine']}"]
    for title, part in (("checkpoint", result), ("outlier variant", result["outliers"])):
        lines += ["", f"{title:20}{'PSNR dB':>9}{'worst':>8}{'SSIM':>9}{'adherence':>11}{'MB':>8}{'seconds':>9}"]
        for name in ENTRIES:
            entry = part[name]
            cells = [entry["psnr_db"], entry["psnr_db_worst"], entry["ssim"], entry.get("adherence")]
            shown = [
                "-" if value is None else f"{value:.{digits}f}"
                for value, digits in zip(cells, (2, 2, 5, 3), strict=True)
            ]
            lines.append(
                f"  {name:18}{shown[0]:>9}{shown[1]:>8}{shown[2]:>9}{shown[3]:>11}{entry['bytes'] / 1e6:>8.1f}"
                f"{entry['seconds']:>9.1f}"
            )
    exact = result["outlier_variant"]["float32_psnr_db_against_checkpoint"]
    lines += ["", f"float32 of the outlier variant against float32 of the checkpoint: {exact or 'identical'} dB"]
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.quality", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint.TARGET, help="SD1.5 format; default: the demo's")
    parser.add_argument("--prompts", type=Path, default=ROOT / "demo" / "prompts.txt", help="one per line")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--count", type=_positive, default=COUNT, help="prompts to test")
    parser.add_argument("--steps", type=_positive, help=f"default: {DEMO['steps']}")
    parser.add_argument("--cfg", type=float, help=f"default: {DEMO['cfg']:g} for the demo, else {OTHERS['cfg']:g}")
    parser.add_argument("--size", type=_eights, help=f"pixels; default: {SIZE} for the demo, else {OTHERS['size']}")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _eights(text: str) -> int:
    value = _positive(text)
    if value % 8:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 8 pixels")
    return value


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    raise SystemExit(main())
