"""The demo: calibrate and quantize the demo checkpoint in a real ComfyUI, by the shipped workflows, and report.

`python -m demo.run --checkpoint FILE --out DIR`. Every picture is made twice with the same seed, by the float model and
by the int8 model of the same graph; a few are made a third time by the saved file.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from demo import html
from devkit import workflow
from devkit.client import Client, HostError, Result
from devkit.host import Server
from devkit.paths import CACHE, WORKFLOWS
from tfmq.report import sheet

from . import adherence, render
from .adapt import for_demo

PICTURES, CALIBRATION = 32, 8
SEED = 1
RELOADED = 3
PROMPTS = Path(__file__).with_name("prompts.txt")


class DemoError(RuntimeError):
    """The demo did not show what it has to show."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that server and temporary folder go, too
    (CACHE / "demo").mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="host-", dir=CACHE / "demo", ignore_cleanup_errors=True) as base:
            Demo(Path(base), arguments.checkpoint, arguments.out).run()
    except (DemoError, HostError, workflow.WorkflowError, RuntimeError, OSError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    return 0


class Demo:
    """One run. `pictures[kind]` are the decoded pictures, [64, 64, 3] in 0..1, in the order of the prompts."""

    def __init__(self, base: Path, checkpoint: Path, out: Path):
        self.base, self.checkpoint, self.out = base, checkpoint, out
        prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
        # Calibrated on other prompts than those that are compared.
        self.prompts, self.calibration_prompts = prompts[:PICTURES], prompts[-CALIBRATION:]
        self.pictures: dict[str, list[np.ndarray]] = {"float": [], "quantized": []}
        self.quality: list[dict[str, float]] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def run(self) -> None:
        started = time.monotonic()
        for kind in self.pictures:
            (self.out / kind).mkdir(parents=True, exist_ok=True)
        stage = Stage("starting ComfyUI")
        with Server(self.base, {"checkpoints": [self.checkpoint]}) as server:
            self.seconds["host_start"] = stage.done()
            client, info = server.client, server.client.object_info()
            told, saved, latents = self._pictures(client, self._prompt("quantize_sd15", info))
            self._check_saved(client, self._prompt("load_sd15", info), saved, latents)
            version = client.system_stats()["system"]["comfyui_version"]
        self.seconds["total"] = time.monotonic() - started
        self._report(told, version)

    def _prompt(self, name: str, info: dict[str, Any]) -> workflow.Prompt:
        shipped = workflow.load(WORKFLOWS / f"{name}.json")
        adapted = for_demo(shipped, info, self.checkpoint.name, self.prompts[0], self.calibration_prompts)
        return workflow.to_prompt(adapted, info)

    def _pictures(self, client: Client, prompt: workflow.Prompt) -> tuple[dict[str, Any], str, list[bytes]]:
        """Run the quantizing workflow once per prompt; returns its report, the saved file's name, some latents."""
        nodes = {
            "prompt": workflow.find(prompt, "CLIPTextEncode", "Prompt"),
            "calibrate": workflow.find(prompt, "TFMQ_Calibrate"),
            "quantize": workflow.find(prompt, "TFMQ_Quantize"),
            "compare": workflow.find(prompt, "TFMQ_Compare"),
            "save": workflow.find(prompt, "TFMQ_Save"),
            "sample_float": workflow.find(prompt, "KSampler", "Sample (float)"),
            "sample_quantized": workflow.find(prompt, "KSampler", "Sample (int8)"),
            "float": workflow.find(prompt, "SaveImage", "Save image (float)"),
            "quantized": workflow.find(prompt, "SaveImage", "Save image (int8)"),
        }
        # What the nodes hand out as values is shown, so that it can be read from the history.
        prompt["report"] = _show(nodes["quantize"], 2)
        prompt["psnr_db"], prompt["ssim"] = _show(nodes["compare"], 2), _show(nodes["compare"], 3)
        prompt["latent"] = _save_latent(nodes["sample_quantized"])
        for name in ("sample_float", "sample_quantized"):
            prompt[nodes[name]]["inputs"]["seed"] = SEED
        stage = Stage(f"calibrating on {CALIBRATION} prompts")
        sampling: Stage | None = None
        told: dict[str, Any] = {}
        latents: list[bytes] = []
        for index, text in enumerate(self.prompts):
            prompt[nodes["prompt"]]["inputs"]["text"] = text

            def progress(node: str, value: float, maximum: float) -> None:
                nonlocal sampling
                if node == nodes["calibrate"]:
                    stage.show(value / maximum)
                elif sampling is None and node in (nodes["sample_float"], nodes["sample_quantized"]):
                    stage.done()
                    sampling = Stage(f"{PICTURES} pictures from float and from int8")

            result = client.queue(prompt, progress)
            if index == 0:
                told = {"report": json.loads(result.text("report")), "saved": result.text(nodes["save"])}
                sampling = sampling or Stage(f"{PICTURES} pictures from float and from int8")
            for name in ("calibrate", "quantize", "save", "sample_float", "sample_quantized"):
                self.seconds[name] += result.seconds.get(nodes[name], 0.0)
            self._keep(client, result, index, nodes)
            if index < RELOADED:
                latents.append(client.fetch(result.outputs["latent"]["latents"][0]))
            assert sampling is not None
            sampling.show((index + 1) / PICTURES)
        assert sampling is not None
        sampling.done()
        return told["report"], told["saved"], latents

    def _keep(self, client: Client, result: Result, index: int, nodes: dict[str, str]) -> None:
        for kind, pictures in self.pictures.items():
            encoded = client.images(result, nodes[kind])[0]
            _write(self.out / kind / f"{index:02}.png", encoded)
            pictures.append(_decode(encoded))
        self.quality.append({name: float(result.text(name)) for name in ("psnr_db", "ssim")})

    def _check_saved(self, client: Client, prompt: workflow.Prompt, saved: str, latents: list[bytes]) -> None:
        """The saved file must give the same latents and pictures, to the bit, as the graph that it was saved from."""
        stage = Stage(f"{RELOADED} pictures from the saved file")
        within = Path(saved).relative_to(self.base / "models").parts[1:]
        prompt[workflow.find(prompt, "TFMQ_Load")]["inputs"]["model_name"] = "/".join(within)
        sampler = workflow.find(prompt, "KSampler", "Sample (int8)")
        prompt[sampler]["inputs"]["seed"] = SEED
        prompt["latent"] = _save_latent(sampler)
        image = workflow.find(prompt, "SaveImage")
        for index, expected in enumerate(latents):
            prompt[workflow.find(prompt, "CLIPTextEncode", "Prompt")]["inputs"]["text"] = self.prompts[index]
            result = client.queue(prompt)
            latent = _latent(client.fetch(result.outputs["latent"]["latents"][0]))
            picture = _decode(client.images(result, image)[0])
            if not torch.equal(latent, _latent(expected)) or (picture != self.pictures["quantized"][index]).any():
                raise DemoError(f"The saved file gives another picture than the graph for {self.prompts[index]!r}.")
            stage.show((index + 1) / len(latents))
        self.seconds["load_and_check"] = stage.done()

    def _report(self, told: dict[str, Any], version: str) -> None:
        requests = [render.parse(prompt) for prompt in self.prompts]
        scores = {kind: _scores(pictures, requests) for kind, pictures in self.pictures.items()}
        report = {
            "host_version": version,
            "layers": told["layers"],
            "bytes": told["bytes"],
            "psnr_db": _mean([q["psnr_db"] for q in self.quality]),
            "ssim": _mean([q["ssim"] for q in self.quality]),
            "adherence_float": scores["float"]["score"],
            "adherence_quantized": scores["quantized"]["score"],
            "pictures": PICTURES,
            "seed": SEED,
            "adherence": scores,
            "loaded_file_bit_identical": {"pictures": RELOADED},
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "backends": told.get("backends", {}),
            "per_prompt": [{"prompt": p, **q} for p, q in zip(self.prompts, self.quality, strict=True)],
        }
        _write(self.out / "report.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
        images = [torch.from_numpy(np.stack(self.pictures[kind])).float() for kind in ("float", "quantized")]
        captions = ("float", "int8", "difference x 8")
        pairs = sheet.side_by_side(images[0], images[1], captions=captions)
        sheet.save_png(self.out / "sheet.png", sheet.grid(pairs, columns=4))
        html.write(
            self.out / "report.html",
            report,
            [(f"{PICTURES} prompts, same seed: {', '.join(captions)}", self.out / "sheet.png")],
            title="TFMQ demo: W8A8 against float32",
        )
        before, after = report["bytes"]["before"], report["bytes"]["after"]
        print(self.out / "report.html")
        print(
            f"PSNR {report['psnr_db']:.2f} dB, SSIM {report['ssim']:.4f}, adherence {report['adherence_float']:.3f} ->"
            f" {report['adherence_quantized']:.3f}, {before / 1e6:.1f} -> {after / 1e6:.1f} MB"
        )


class Stage:
    """One line per stage with its share done: in place on a terminal, in steps of a quarter elsewhere."""

    def __init__(self, name: str):
        self.name, self.started, self.shown = name, time.monotonic(), -1.0
        self._print("")

    def show(self, share: float) -> None:
        if sys.stdout.isatty():
            self._print(f" {share:4.0%}")
        elif share - self.shown >= 0.25:
            self.shown = share
            self._print(f" {share:4.0%}")

    def done(self) -> float:
        """Seconds that it took."""
        took = time.monotonic() - self.started
        self._print(f" done in {took:.1f} s")
        if sys.stdout.isatty():
            print()
        return took

    def _print(self, state: str) -> None:
        if sys.stdout.isatty():
            print(f"\r{self.name}{state}\x1b[K", end="", flush=True)
        else:
            print(f"{self.name}{state}", flush=True)


def _show(node: str, slot: int) -> dict[str, Any]:
    return {"class_type": "PreviewAny", "inputs": {"source": [node, slot]}}


def _save_latent(node: str) -> dict[str, Any]:
    return {"class_type": "SaveLatent", "inputs": {"samples": [node, 0], "filename_prefix": "demo/latent"}}


def _latent(file: bytes) -> torch.Tensor:
    from safetensors.torch import load

    return load(file)["latent_tensor"]


def _decode(picture: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def _scores(pictures: list[np.ndarray], requests: list[render.Request]) -> dict[str, float]:
    found = [adherence.judge(picture, request) for picture, request in zip(pictures, requests, strict=True)]
    names = ("score", "shape", "colour", "size", "background")
    return {name: _mean([float(getattr(one, name)) for one in found]) for name in names}


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


if __name__ == "__main__":
    raise SystemExit(main())
