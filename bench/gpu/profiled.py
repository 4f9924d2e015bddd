"""What a call puts on a GPU, by torch's profiler. Names of its fields differ by version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TOP = 30


def launches(call: Callable[[], Any]) -> dict[str, Any]:
    """`launches`: kernels, copies and fills of one call; or `profiler`: why that cannot be told."""
    try:
        return {"launches": sum(count for count, _ in _kernels(call).values())}
    except Exception as error:  # some machines have no counters; what was measured before is not to be lost
        return {"profiler": f"{type(error).__name__}: {error}"[:200]}


def top(call: Callable[[], Any]) -> dict[str, Any]:
    """`top`: the kernels that took most of one call, with milliseconds and count; `launches` and `ms` of all."""
    kernels = _kernels(call)
    ordered = sorted(kernels.items(), key=lambda item: -item[1][1])
    rows = [{"name": name[:120], "ms": round(us / 1e3, 4), "count": count} for name, (count, us) in ordered[:TOP]]
    total = sum(us for _, us in kernels.values())
    return {"top": rows, "launches": sum(count for count, _ in kernels.values()), "kernel_ms": round(total / 1e3, 3)}


def _kernels(call: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Name -> how often, microseconds in all. Raises RuntimeError where the profiler sees nothing."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    found: dict[str, tuple[int, float]] = {}
    for event in seen.events() or []:
        if event.device_type != cuda:
            continue
        for field in ("self_device_time_total", "self_cuda_time_total", "device_time"):
            us = getattr(event, field, None)
            if us is not None:
                break
        count, total = found.get(event.name, (0, 0.0))
        found[event.name] = count + 1, total + float(us or 0.0)
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return found
