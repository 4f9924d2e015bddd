"""A network in every representation, timed in turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.speed.networks import OURS, Contender, Missing, build
from devkit.paths import CACHE

KEPT = CACHE / "speed"


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
            contender = contenders[name] = build(name, model, device, KEPT)
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
