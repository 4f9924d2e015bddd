"""float16 and ours under torch.compile: first one level of SD1.5, which takes seconds to compile, then all of it."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.gpu.case import Case, Job
from bench.gpu.stages.networks import Networks
from bench.speed import unet

LEVEL = unet.Config(64, (1,), (1,), 1, 768, None, False, 0, blocks=1)


def cases(job: Job) -> list[Case]:
    unet.CONFIGS["level"] = LEVEL
    return [
        Case(f"{name} {model}", partial(_compiled, job, name, model), 240.0)
        for model in ("level", "sd15") for name in ("fp16", "ours")
    ]  # fmt: skip


def _compiled(job: Job, name: str, model: str) -> dict[str, Any]:
    networks = Networks(Job(model, job.device, job.out, job.work, job.seconds))
    network: nn.Module = networks.network(name)
    eager = network(*networks.inputs)
    torch._dynamo.reset()
    compiled: Any = torch.compile(network)
    started = time.perf_counter()
    y = compiled(*networks.inputs)
    networks.wait()
    found: dict[str, Any] = {"compile_s": time.perf_counter() - started}
    found["off_eager"] = float((y.float() - eager.float()).norm() / eager.float().norm())
    found["eager_ms"] = 1e3 * networks.seconds(lambda: network(*networks.inputs))
    found["ms"] = 1e3 * networks.seconds(lambda: compiled(*networks.inputs))
    found["error"] = networks.error(y)
    return networks.judged(name, found)
