"""Time of one UNet step, ours against the others: SD1.5 at 512 x 512 and SDXL at 1024 x 1024, batch 2.

`python dev.py bench speed --device cpu --json F`. Needs torch, triton, numpy and safetensors; random weights, so
scaled that activations keep unit size. The contenders take turns, so that a machine that slows down slows all of them:
`median_s` is each one's median, `ratio` the median of its time over ours W8A8 in the same round. A JSON that is there
already is added to, contender by contender, so that a long measurement can be made in pieces (`--contenders`,
`--models`).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from pathlib import Path
from typing import Any

import torch

from bench.speed import unet
from bench.speed.host import end_to_end
from bench.speed.layers_cpu import operations
from bench.speed.networks import default_contenders
from bench.speed.rounds import measure, merge
from tfmq import atomic

SECONDS = 120.0  # after which no further round begins


def describe(device: torch.device) -> dict[str, Any]:
    """The class of machine, without its name."""
    about: dict[str, Any] = {"torch": torch.__version__, "device": device.type, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        return {**about, "name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        flags = set(cpuinfo.read_text().split())
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return {**about, "machine": platform.machine(), "instructions": [flag for flag in known if flag in flags]}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="not used")
    parser.add_argument("--prompts", help="not used")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    models = list(unet.CONFIGS)
    parser.add_argument(
        "--models", nargs="*", choices=[*models, *(m + unet.NCHW for m in models)], default=models,
        help=f"with {unet.NCHW}: every transformer leaves its image in that order, as the host's does",
    )  # fmt: skip
    parser.add_argument("--contenders", nargs="*", help="ours is always among them")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no further round begins")
    parser.add_argument("--operations", action="store_true", help="time single layers as well (CPU)")
    parser.add_argument("--end-to-end", action="store_true", help="time a real ComfyUI as well")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    found: dict[str, Any] = {}
    if arguments.json and arguments.json.is_file():
        found = json.loads(arguments.json.read_text(encoding="utf-8"))
    found["machine"] = describe(device)
    names = default_contenders(device) if arguments.contenders is None else arguments.contenders

    def write() -> None:
        if arguments.json:
            atomic.write_bytes(arguments.json, f"{json.dumps(found, indent=1)}\n".encode())

    with torch.inference_mode():
        for model in arguments.models:
            before = found.get(model, {})

            def keep(result: dict[str, Any], model: str = model, before: dict[str, Any] = before) -> None:
                found[model] = merge(before, result)
                write()

            if arguments.rounds:
                measure(model, names, device, arguments.rounds, arguments.seconds, keep)
            found.setdefault(model, {})
            for name, ratio in found[model].get("ratio", {}).items():
                print(f"{model:6s}{name:20s}{found[model]['median_s'][name]:8.3f} s {ratio:6.2f} x ours")
            if arguments.operations and device.type == "cpu" and model in unet.CONFIGS:
                found[model]["operations"] = operations(model)
                write()
            if arguments.end_to_end and model in unet.CONFIGS:
                found[model]["end_to_end"] = end_to_end(model, device)
                print(model, found[model]["end_to_end"], flush=True)
                write()
            gc.collect()


if __name__ == "__main__":
    main()
