"""What the machine has, and what the vendor's own kernels reach on it: the ceiling of all that follows."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.gpu.case import Absent, Case, Job

COPY_BYTES = 1 << 30
SIDE = 8192  # of the square products
RUNS = 20


def cases(job: Job) -> list[Case]:
    found = [Case("versions", _versions), Case("compiler", _compiler)]
    if job.device == "cuda":
        found += [Case("gpu", _gpu), Case("copy", _copy), Case("fp16", _fp16), Case("int_mm", _int_mm)]
    return found


def _versions() -> dict[str, Any]:
    import torch

    about: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy", "safetensors"):
        try:
            about[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            about[package] = "missing"
    about |= {"cuda": torch.version.cuda, "cores": os.cpu_count()}
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about


def _compiler() -> dict[str, Any]:
    """What Triton's launcher is compiled with, where this version of it needs that."""
    names = [os.environ.get("CC"), "gcc", "clang", "cc"]
    compiler = next((name for name in names if name and shutil.which(name)), "none")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return {"compiler": compiler, "python_h": "there" if header.is_file() else "missing"}


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise Absent("torch sees no GPU")
    properties = torch.cuda.get_device_properties(0)
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size",
             "shared_memory_per_block_optin", "regs_per_multiprocessor", "clock_rate")  # fmt: skip
    about = {name: getattr(properties, name) for name in names if hasattr(properties, name)}
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
        about["nvidia_smi"] = f"{asked}: {done.stdout.strip() or done.stderr.strip()[:200]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        about["nvidia_smi"] = str(error)[:200]
    return about


def _seconds(call: Callable[[], Any], runs: int = RUNS) -> float:
    import torch

    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(runs):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3 / runs


def _copy() -> dict[str, Any]:
    import torch

    a = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return {"gb_per_s": 2 * COPY_BYTES / _seconds(lambda: b.copy_(a)) / 1e9, "counts": "bytes read and written"}


def _fp16() -> dict[str, Any]:
    import torch

    a, b = (torch.randn(SIDE, SIDE, device="cuda").half() for _ in range(2))
    return {"tops": 2 * SIDE**3 / _seconds(lambda: a @ b) / 1e12, "side": SIDE}


def _int_mm() -> dict[str, Any]:
    import torch

    a, b = (torch.randint(-127, 128, (SIDE, SIDE), device="cuda").to(torch.int8) for _ in range(2))
    return {"tops": 2 * SIDE**3 / _seconds(lambda: torch._int_mm(a, b.t())) / 1e12, "side": SIDE}
