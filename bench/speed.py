"""Time of one UNet step, ours against the others: SD1.5 at 512 x 512 and SDXL at 1024 x 1024, batch 2.

`python dev.py bench speed --device cpu --json F`. Needs torch, triton and numpy only; random weights, scaled so that
activations keep unit size. The contenders take turns, so that a machine that slows down slows all of them: `median_s`
is each one's median, `ratio` the median of its time over ours W8A8 in the same round. A JSON that is there already is
added to, contender by contender, so that a long measurement can be made in pieces (`--contenders`, `--models`).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import unet
from bench.speed_host import end_to_end
from bench.speed_networks import OURS, Contender, Missing, build, default_contenders
from bench.speed_operations import operations
from tfmq import atomic

CACHE = Path(__file__).parent.parent / ".cache" / "speed"
SECONDS = 120.0  # after which no further round begins


def measure(
    model: str, names: list[str], device: torch.device, rounds: int, seconds: float,
    keep: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    """`keep` gets the result after every round: medians and ratios of one model; a contender that cannot run here is
    named in its `left_out`."""
    if OURS not in names:
        names = [OURS, *names]
    contenders: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    peaks: dict[str, int] = {}
    for name in names:
        try:
            contender = contenders[name] = build(name, model, device, CACHE)
        except Missing as error:
            left_out[name] = str(error)
            print(f"{model} {name}: left out, {error}", flush=True)
            continue
        gc.collect()
        peaks[name] = _peak(contender, device)  # the first call, which is not timed
        print(f"{model} {name}: ready, {contender.resident / 1e6:.0f} MB", flush=True)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for done in range(rounds):
        if done and time.perf_counter() - started > seconds:
            break
        for name, contender in contenders.items():
            times[name].append(_time(contender, device))
        print(model, *(f"{name} {t[-1]:.3f} s" for name, t in times.items()), flush=True)
        keep(
            {
                "rounds": done + 1,
                "median_s": {name: statistics.median(t) for name, t in times.items()},
                "least_s": {name: min(t) for name, t in times.items()},
                "ratio": {
                    name: statistics.median(a / b for a, b in zip(t, times[OURS], strict=True))
                    for name, t in times.items()
                    if name != OURS
                },
                "resident_bytes": {name: c.resident for name, c in contenders.items()},
                "peak_extra_bytes": peaks,
                "notes": {name: c.notes for name, c in contenders.items() if c.notes},
                "left_out": left_out,
            }
        )


def _time(contender: Contender, device: torch.device) -> float:
    start = time.perf_counter()
    contender.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _peak(contender: Contender, device: torch.device) -> int:
    """Bytes that a step takes at most beyond what was there before; 0 where the system does not tell."""
    contender.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contender.step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        contender.step()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return 0


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The entries of `new` put into those of `old`; ours keeps the figures of the longer measurement."""
    shorter = new.get("rounds", 0) < old.get("rounds", 0)
    out = {**old, **{k: v for k, v in new.items() if not isinstance(v, dict) and not shorter}}
    for key, value in new.items():
        if isinstance(value, dict):
            before = old.get(key, {})
            out[key] = {**before, **value}
            if shorter and OURS in before:
                out[key][OURS] = before[OURS]
    for name in out.get("median_s", {}):
        out.get("left_out", {}).pop(name, None)
    return out


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
