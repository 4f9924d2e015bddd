"""Time of a per-token Linear over a static one, per backend: what `kernels/table.py` declares in `costs`.

`python dev.py bench dynamic_cost --json F`: Linear shapes of SD1.5 at 512 x 512, batch 2, the two kinds interleaved;
prints the ratio of medians per shape and their geometric mean.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch

from tfmq import atomic
from tfmq.formats.affine import affine_grid, channel_scale, quantize_weight
from tfmq.geometry import Geometry, StaticInput
from tfmq.kernels.table import BACKENDS, LINEAR_DYNAMIC

SHAPES = ((8192, 320, 320), (8192, 320, 2560), (2048, 640, 640), (512, 1280, 1280), (512, 1280, 10240))
REPEATS = 15


def measure(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Backend -> "MxKxN" -> ratio; "mean" is the geometric one. Backends that refuse the device are left out."""
    found: dict[str, dict[str, float]] = {}
    for backend in BACKENDS:
        if backend.name == "reference" or backend.refuse(LINEAR_DYNAMIC, device, Geometry((1, 1))) is not None:
            continue
        ratios = {}
        for rows, inputs, outputs in SHAPES:
            x = torch.randn(rows, inputs, device=device, dtype=dtype)
            weight = torch.randn(outputs, inputs, device=device)
            scale = channel_scale(weight)
            ready = backend.module.prepare(quantize_weight(weight, scale), scale, Geometry((outputs, inputs)))
            grid = StaticInput(*affine_grid(x.amin().float().reshape(1), x.amax().float().reshape(1)), None)
            times: dict[str, list[float]] = {"static": [], "dynamic": []}
            for repeat in range(REPEATS + 2):
                for kind in times:
                    start = _now(device)
                    if kind == "static":
                        backend.module.linear_static(x, ready, grid, None)
                    else:
                        backend.module.linear_dynamic(x, ready, None, None)
                    if repeat >= 2:
                        times[kind].append(_now(device) - start)
            ratios[f"{rows}x{inputs}x{outputs}"] = statistics.median(times["dynamic"]) / statistics.median(
                times["static"]
            )
        ratios["mean"] = math.exp(sum(math.log(r) for r in ratios.values()) / len(ratios))
        found[backend.name] = ratios
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="not used")
    parser.add_argument("--prompts", help="not used")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the ratios there")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    with torch.inference_mode():
        found = measure(device, dtype)
    for name, ratios in found.items():
        for shape, ratio in ratios.items():
            print(f"{name:10s} {shape:18s} {ratio:.2f}")
    if arguments.json:
        atomic.write_bytes(arguments.json, f"{json.dumps(found, indent=1)}\n".encode())
