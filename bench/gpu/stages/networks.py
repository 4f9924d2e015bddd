"""A whole network with random weights, one step of batch 2: float16 and ours, eager and as a CUDA graph, as the host's
own layout has it; errors against float32, memory, and where the time goes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu import profiled, quick
from bench.gpu.case import Case, Job, Wrong
from bench.speed import unet
from bench.speed.networks import BATCH, OURS, build, float_network

SECONDS = 2.0  # of timing per contender
MOST = 30
# Against float32, relative. Real networks and calibrated ranges come to a few hundredths (docs/speed.md); a kernel that
# adds wrongly leaves nothing of the picture.
LIMIT = {"fp16": 0.05, "ours": 0.5}


def cases(job: Job) -> list[Case]:
    networks = Networks(job)
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in ("fp16", "ours"):
        found[f"{name} eager"] = partial(networks.eager, name)
        found[f"{name} graph"] = partial(networks.graph, name)
    for name in ("ours", "fp16"):
        found[f"{name} profile"] = partial(networks.profile, name)
    for name in ("fp16", "ours"):
        found[f"{name} NCHW"] = partial(networks.eager, f"{name} NCHW")
    found["ours calibrated"] = networks.calibrated
    return [Case(name, run, 60.0) for name, run in found.items()]


class Networks:
    """Each is made when the first case asks for it."""

    def __init__(self, job: Job) -> None:
        self.model, self.device, self.work = job.stage, torch.device(job.device), Path(job.work)
        self.config = unet.CONFIGS[self.model]
        self.inputs = unet.inputs(self.config, BATCH, torch.float16, self.device)
        self.made: dict[str, nn.Module] = {}

    def network(self, name: str) -> nn.Module:
        """Named "fp16", "ours" or these with " NCHW": in the host's layout, which makes NCHW behind transformers."""
        if name in self.made:
            return self.made[name]
        nchw = name.endswith("NCHW")
        if nchw:
            self.made.clear()  # its memory; these are the last
            gc.collect()
        config = unet.config_of(self.model + unet.NCHW) if nchw else self.config
        network = float_network(config, self.device, torch.float16)
        if name.startswith("ours"):
            quick.quantize(network, self.inputs)
        if nchw:
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.data = module.weight.data.contiguous()
        self.made[name] = network
        return network

    @cached_property
    def truth(self) -> Tensor:
        """What float32 gives with the weights of float16."""
        wide = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        try:
            network = float_network(self.config, self.device, torch.float16).float()
            x, t, *rest = self.inputs
            return network(x.float(), t, *(None if value is None else value.float() for value in rest))
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = wide

    def step(self, name: str) -> Callable[[], Tensor]:
        network = self.network(name)
        x, *rest = self.inputs
        if name.endswith("NCHW"):
            x = x.contiguous()
        return lambda: network(x, *rest)

    def eager(self, name: str) -> dict[str, Any]:
        started = time.perf_counter()
        step = self.step(name)
        ready = time.perf_counter()
        y = step()
        self.wait()
        found: dict[str, Any] = {"made_s": ready - started, "first_s": time.perf_counter() - ready}
        found["error"] = self.error(y)
        found |= {"ms": 1e3 * self.seconds(step), "peak_mb": self._peak(step)}
        return self.judged(name, found)

    def graph(self, name: str) -> dict[str, Any]:
        """Captured, replayed and compared with eager."""
        step = self.step(name)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected = step()  # what is chosen or packed at a first call is so before the capture
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            y = step()
        captured.replay()
        self.wait()
        found: dict[str, Any] = {"error": self.error(y), "equals_eager": bool(torch.equal(y, expected))}
        found["off_eager"] = float((y.float() - expected.float()).norm() / expected.float().norm())
        found["ms"] = 1e3 * self.seconds(captured.replay)
        if found["off_eager"] > 1e-2:
            raise Wrong(f"a replay is {found['off_eager']:.3f} off what eager gives")
        return self.judged(name, found)

    def profile(self, name: str) -> dict[str, Any]:
        step = self.step(name)
        step()
        return profiled.top(step)

    def calibrated(self) -> dict[str, Any]:
        """As TFMQ Calibrate and TFMQ Quantize make it, on one call; and how long that takes."""
        self.made.clear()
        gc.collect()
        started = time.perf_counter()
        ours = build(OURS, self.model, self.device, self.work / "calibrations")
        self.wait()
        found: dict[str, Any] = {"made_s": time.perf_counter() - started, "notes": ours.notes}
        found["error"] = self.error(ours.step())
        found |= {"ms": 1e3 * self.seconds(ours.step), "resident_mb": ours.resident / 1e6}
        return self.judged("ours", found)

    def judged(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        limit = LIMIT[name.split(" ")[0]]
        if not found["error"] <= limit:
            raise Wrong(f"relative error {found['error']:.4f} against float32, more than {limit} ({found})")
        return found

    def error(self, y: Tensor) -> float:
        return float((y.float() - self.truth).norm() / self.truth.norm())

    def seconds(self, call: Callable[[], Any]) -> float:
        call()
        self.wait()
        times: list[float] = []
        while len(times) < 3 or (sum(times) < SECONDS and len(times) < MOST):
            started = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def _peak(self, call: Callable[[], Any]) -> float:
        """Megabytes that a step takes at most beyond what was there before."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
