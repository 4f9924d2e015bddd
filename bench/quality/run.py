"""The entries of both models, measured and written down one by one."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.quality.kept import Kept, calibrations_in
from bench.quality.makers import ABLATED, EFFORTS, MAKERS, MIXED, Source, dominated, in_bytes, make
from bench.quality.sampling import (
    DEMO,
    SEED,
    Setting,
    calibrate,
    encode,
    in_float16,
    load,
    read_prompts,
    sample,
    say,
    split,
    timesteps,
)  # fmt: skip
from demo import adherence, checkpoint, render
from devkit import inprocess
from tfmq import atomic
from tfmq.report import metrics

REFERENCE = "float32"
PLAIN, OUTLIERS = "checkpoint", "outliers"
TEMPORAL, DOMINATES = "temporal_ablation", "dominates"
# What is measured on which model.
PARTS = {PLAIN: (PLAIN, TEMPORAL, DOMINATES), OUTLIERS: (OUTLIERS,)}
KNOWN_PARTS = [part for parts in PARTS.values() for part in parts]
OTHERS = {"steps": 20, "cfg": 7.0, "size": 512}


@torch.inference_mode()  # as in the host
def measure(given: argparse.Namespace) -> dict[str, Any]:
    """The benchmark, or the parts of it that were asked for; a dict that strict JSON can hold."""
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here: run with --device cpu.")
    tested, calibration = split(read_prompts(given.prompts), given.count)
    inprocess.use_host(given.device)
    pack = inprocess.load_pack()
    from bench.quality.outliers import add_outliers

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
        from bench.quality.host_formats import resident_bytes, stored_bytes

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
        from bench.quality.host_formats import stored_bytes
        from bench.quality.temporal_ablation import BITS, float_bytes, variants
        from bench.temporal.error import replaced

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
        from bench.quality.host_formats import resident_bytes, stored_bytes

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


def finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def host_version() -> str:
    import comfyui_version

    return comfyui_version.__version__
