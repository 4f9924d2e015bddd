"""The demo's graph in ComfyUI's own code: pictures on the GPU against those on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.gpu.case import Absent, Case, Job, Wrong
from devkit.paths import ROOT, host_dir
from tfmq.report import metrics

LIMIT = 300.0
ALLOWED_DB = 6.0  # quantizing on the GPU may cost up to twice the error that it costs on the CPU


def cases(job: Job) -> list[Case]:
    if not (host_dir() / "main.py").is_file():
        raise Absent(f"there is no ComfyUI in {host_dir()}")
    comfy = InComfy(job)
    return [
        Case("pictures on the GPU", lambda: comfy.make("cuda"), LIMIT),
        Case("pictures on the CPU", lambda: comfy.make("cpu"), LIMIT), Case("PSNR", comfy.compare),
    ]  # fmt: skip


class InComfy:
    def __init__(self, job: Job) -> None:
        self.job = job

    def file(self, device: str) -> Path:
        return Path(self.job.work) / f"pictures-{device}.pt"

    def make(self, device: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "bench.gpu.pictures", "--device", device, "--out", str(self.file(device))]
        command += ["--checkpoint", self.job.checkpoint] if self.job.checkpoint else []
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)  # its errors go to the log
        print(done.stdout, flush=True)
        if done.returncode:
            raise RuntimeError(f"bench.gpu.pictures ended with {done.returncode}: the log says why")
        return json.loads(done.stdout.splitlines()[-1])

    def compare(self) -> dict[str, Any]:
        """PSNR in dB, the worst of the pictures too, and a sheet of them."""
        missing = [device for device in ("cpu", "cuda") if not self.file(device).is_file()]
        if missing:
            raise Absent(f"no pictures of {' and '.join(missing)}")
        cpu, gpu = (torch.load(self.file(device)) for device in ("cpu", "cuda"))
        pairs = {
            "float, GPU against CPU": (cpu["float"], gpu["float"]), "ours, GPU against CPU": (cpu["ours"], gpu["ours"]),
            "ours against float, GPU": (gpu["float"], gpu["ours"]),
            "ours against float, CPU": (cpu["float"], cpu["ours"]),
        }  # fmt: skip
        found = {f"{name} dB": round(min(float(metrics.psnr(*pair)), 200.0), 3) for name, pair in pairs.items()}
        torch.save({"cpu": cpu, "gpu": gpu}, Path(self.job.out) / "pictures.pt")
        lost = found["ours against float, CPU dB"] - found["ours against float, GPU dB"]
        if not lost <= ALLOWED_DB:
            raise Wrong(f"quantized pictures are {lost:.1f} dB further from float than on the CPU: {found}")
        return found
