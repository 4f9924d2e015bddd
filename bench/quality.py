"""How near to float32 do quantized models stay? Ours and what others have, on a checkpoint and its outlier variant.

`python -m bench.quality [--checkpoint FILE] [--prompts FILE] [--device cpu|cuda] [--json FILE] [--count N] [--steps N]
[--cfg X] [--size N] [--only A,B] [--parts A,B] [--keep FOLDER]`. Every model samples the same prompts with the same
seeds (euler, normal); the pictures are compared with those of the float32 model. The outlier variant computes the same
function as the checkpoint with activations that are harder to quantize (`bench/outliers.py`). All models but float32
are made of the float16 model.

Beside the entries of both models there are, of the checkpoint, `temporal_ablation` (`bench/quality_temporal.py`) and
`dominates`: whether a mixed plan at the bytes of each other entry is at least as good.

`--only` and `--parts` measure some of it and add it to what FILE holds of the same run; `--keep` keeps the pictures of
float32 and the calibrations in FOLDER for the next of such calls (empty it when the code changes).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from demo import adherence, checkpoint, render
from demo.adapt import SAMPLING, SIZE
from devkit import inprocess
from tfmq import atomic
from tfmq.report import metrics

from .quality_kept import Kept, calibrations_in
from .quality_makers import ABLATED, EFFORTS, MAKERS, MIXED, Source, dominated, in_bytes, make

ROOT = Path(__file__).resolve().parent.parent
COUNT, CALIBRATION = 64, 16
SEED, CALIBRATION_SEED = 1000, 500_000
BATCH = 8  # prompts per sampler call; the same for every model
REFERENCE = "float32"
ENTRIES = (REFERENCE, *MAKERS)
PLAIN, OUTLIERS = "checkpoint", "outliers"
TEMPORAL, DOMINATES = "temporal_ablation", "dominates"
# What is measured on which model.
PARTS = {PLAIN: (PLAIN, TEMPORAL, DOMINATES), OUTLIERS: (OUTLIERS,)}
KNOWN_PARTS = [part for parts in PARTS.values() for part in parts]
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
    return 0


@torch.inference_mode()  # as in the host
def measure(given: argparse.Namespace) -> dict[str, Any]:
    """The benchmark, or the parts of it that were asked for; a dict that strict JSON can hold."""
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
    about = described(given, tested, calibration)
    result = merged(given, about)
    kept = Kept(given.keep, sys.modules[f"{pack.__name__}.tfmq.files"], about)
    model, clip, vae = load(given.checkpoint)
    say(f"encoding {len(tested)} + {len(calibration)} prompts")
    encoded = [encode(clip, text) for text in tested]
    setting = Setting(tested, encoded, encode(clip, ""), given.steps, given.cfg, given.size, vae)
    conditionings = [encode(clip, text) for text in calibration]
    del clip
    requests = [render.parse(prompt) for prompt in tested] if is_demo else None
    names = [name for name in MAKERS if given.only is None or name in given.only]
    pictures: dict[str, Tensor] = {}
    asked = given.parts or ([PLAIN, OUTLIERS] if given.only else KNOWN_PARTS)
    for variant, parts in PARTS.items():
        wanted = [part for part in parts if part in asked]
        if not wanted:
            continue
        if variant == OUTLIERS:
            model, _, _ = load(given.checkpoint, text=False)
            scaled = add_outliers(model.model.diffusion_model)
            about_variant = result.setdefault("outlier_variant", {})
            about_variant.update(tensors=len(scaled), scaled_channels=sum(scaled.values()))
        run = Run(variant, pack, setting, conditionings, requests, kept)
        found = result if variant == PLAIN else result.setdefault(variant, {})
        reference = pictures[variant] = run.reference(model, found)
        source = Source(pack, in_float16(given.checkpoint, model), run.calibrate)
        for name in names if variant in wanted else []:
            found[name] = run.entry(name, source, reference)
            write(given.json, result)
        if TEMPORAL in wanted:
            result[TEMPORAL] = run.temporal_ablation(source, reference)
            write(given.json, result)
        if DOMINATES in wanted and MIXED in found:
            result[DOMINATES] = run.dominates(source, reference, found)
    plain = pictures.get(PLAIN, kept.pictures(PLAIN))
    if OUTLIERS in pictures and plain is not None:
        # How exactly the rescaling preserves the function: the variant's float32 pictures against the checkpoint's.
        exact = finite(metrics.psnr(plain, pictures[OUTLIERS]))
        result["outlier_variant"]["float32_psnr_db_against_checkpoint"] = exact
    write(given.json, result)
    if given.json:
        say(f"written: {given.json}")
    return result


def described(given: argparse.Namespace, tested: list[str], calibration: list[str]) -> dict[str, Any]:
    """What the figures of a run depend on beside the code."""
    return {
        "checkpoint": given.checkpoint.name,
        "checkpoint_bytes": given.checkpoint.stat().st_size,
        "prompts": len(tested),
        "prompts_sha256": hashlib.sha256("\n".join([*tested, *calibration]).encode()).hexdigest(),
        "calibration_prompts": {
            "count": len(calibration),
            "among_the_tested": bool(set(calibration) & set(tested)),
        },
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


def merged(given: argparse.Namespace, about: dict[str, Any]) -> dict[str, Any]:
    """What the file of a run in pieces holds already, or a new result. Raises ValueError if it is of another run."""
    if given.json is None or not given.json.is_file() or not (given.only or given.parts):
        return dict(about)
    earlier = json.loads(given.json.read_text(encoding="utf-8"))
    changed = [name for name, value in about.items() if name != "machine" and earlier.get(name) != value]
    if changed:
        raise ValueError(f"{given.json} holds a run with another {changed[0]}: give another --json file.")
    return earlier


def write(path: Path | None, result: dict[str, Any]) -> None:
    if path:
        atomic.write_bytes(path, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


@dataclass(frozen=True)
class Run:
    """The entries of one float model: of the checkpoint or of its outlier variant."""

    variant: str
    pack: ModuleType
    setting: Setting
    calibration: list[Any]
    requests: list[render.Request] | None
    kept: Kept

    def reference(self, model: Any, found: dict[str, Any]) -> Tensor:
        """The pictures of float32, and its entry in `found`."""
        from .host_formats import resident_bytes, stored_bytes

        pictures = self.kept.pictures(self.variant)
        if pictures is None:
            started = time.perf_counter()
            pictures = sample(model, self.setting)
            say(f"{self.variant}: float32 in {time.perf_counter() - started:.0f} s")
            self.kept.keep_pictures(self.variant, pictures)
        sizes = {"bytes": stored_bytes(model), "resident_bytes": resident_bytes(model), "seconds": 0.0}
        found[REFERENCE] = figures(pictures, pictures, self.requests) | sizes
        return pictures

    def entry(self, name: str, source: Source, reference: Tensor) -> dict[str, Any]:
        """The figures of a named entry."""
        started = time.perf_counter()
        with self._place(name, anew=True):
            quantized, seconds = make(name, source)
        entry = self._figures(quantized, reference) | {"seconds": round(seconds, 2)} | source.notes.get(name, {})
        say(f"{self.variant}: {name}: {entry['psnr_db']} dB ({time.perf_counter() - started:.0f} s)")
        return entry

    def temporal_ablation(self, source: Source, reference: Tensor) -> dict[str, Any]:
        """The 4-bit model with its temporal path in float, and quantized in each way; bytes of the whole network."""
        from .host_formats import stored_bytes
        from .quality_temporal import BITS, float_bytes, variants
        from .temporal_error import replaced

        network = source.model.model.diffusion_model
        with self._place(ABLATED):
            base, _ = make(ABLATED, source)
        rest = stored_bytes(base) - float_bytes(network)
        found = {"float": self._figures(base, reference)}
        for name, way in variants(network, timesteps(source.model, self.setting.steps)).items():
            with replaced(network, way.features):
                pictures = sample(base, self.setting)
            found[name] = figures(reference, pictures, self.requests) | {"bytes": rest + way.nbytes}
            say(f"{TEMPORAL}: {name}: {found[name]['psnr_db']} dB")
        return {"of": ABLATED, "weight_bits": BITS, **found}

    def dominates(self, source: Source, reference: Tensor, entries: dict[str, Any]) -> dict[str, Any]:
        """Whether a mixed plan of at most the bytes of each other entry is at least as good."""

        def measure(name: str, size: int) -> dict[str, Any] | None:
            mixed = in_bytes(source, size, EFFORTS.get(name, "balanced"))
            found = None if mixed is None else self._figures(mixed, reference)
            say(f"{DOMINATES}: in the bytes of {name}: {'none' if found is None else found['psnr_db']} dB")
            return found

        with self._place(ABLATED):
            return dominated({name: entries[name] for name in MAKERS if name in entries}, measure)

    def _place(self, entry: str, anew: bool = False) -> AbstractContextManager[None]:
        return calibrations_in(self.kept.place(self.variant, entry, anew))

    def _figures(self, quantized: Any, reference: Tensor) -> dict[str, Any]:
        from .host_formats import resident_bytes, stored_bytes

        found = figures(reference, sample(quantized, self.setting), self.requests)
        return found | {"bytes": stored_bytes(quantized), "resident_bytes": resident_bytes(quantized)}

    def calibrate(self, model: Any) -> tuple[Any, float]:
        """The calibration of a MODEL, and the seconds that it took."""
        found = self.kept.calibration(self.variant, lambda: calibrate(self.pack, model, self.setting, self.calibration))
        say(f"{self.variant}: calibrated on {len(self.calibration)} prompts in {found[1]:.0f} s")
        return found


def figures(reference: Tensor, pictures: Tensor, requests: list[render.Request] | None) -> dict[str, Any]:
    """How near the pictures of an entry are. psnr_db is None where they are identical."""
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
    return entry


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
    for title, part in (("checkpoint", result), ("outlier variant", result.get(OUTLIERS, {}))):
        heads = f"{'PSNR dB':>9}{'worst':>8}{'SSIM':>9}{'adherence':>11}{'MB':>8}{'memory':>8}{'seconds':>9}"
        lines += ["", f"{title:20}{heads}"]
        for name in ENTRIES:
            if name not in part:
                continue
            entry = part[name]
            cells = [entry["psnr_db"], entry["psnr_db_worst"], entry["ssim"], entry.get("adherence")]
            shown = [
                "-" if value is None else f"{value:.{digits}f}"
                for value, digits in zip(cells, (2, 2, 5, 3), strict=True)
            ]
            lines.append(
                f"  {name:18}{shown[0]:>9}{shown[1]:>8}{shown[2]:>9}{shown[3]:>11}{entry['bytes'] / 1e6:>8.1f}"
                f"{entry['resident_bytes'] / 1e6:>8.1f}{entry['seconds']:>9.1f}"
            )
    exact = result.get("outlier_variant", {}).get("float32_psnr_db_against_checkpoint", "not compared")
    lines += ["", f"float32 of the outlier variant against float32 of the checkpoint, dB: {exact or 'identical'}"]
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
    parser.add_argument("--only", type=_among(MAKERS), metavar="A,B", help=f"entries: {', '.join(MAKERS)}")
    parser.add_argument("--parts", type=_among(KNOWN_PARTS), metavar="A,B", help=f"parts: {', '.join(KNOWN_PARTS)}")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for runs in pieces")
    parser.add_argument("--size", type=_eights, help=f"pixels; default: {SIZE} for the demo, else {OTHERS['size']}")
    return parser


def _among(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        wanted = [name.strip() for name in text.split(",")]
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; there is: {', '.join(known)}")
        return wanted

    return names


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
