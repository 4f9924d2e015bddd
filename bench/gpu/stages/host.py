"""Microseconds of Python and number of launches per call of a leaf: layers so small that the GPU waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bench.gpu.case import Case, Job
from bench.gpu.profiled import launches
from tfmq.formats.affine import affine_grid, channel_scale, quantize_weight
from tfmq.geometry import Geometry, geometry_of
from tfmq.kernels.table import pick
from tfmq.runtime import norm_silu_conv
from tfmq.runtime.leaf import QuantConv2d, QuantLinear
from tfmq.runtime.run_state import RunState
from tfmq.scheme import DYNAMIC, STATIC, Scheme
from tfmq.state import LayerState
from tfmq.timeline import Partition, TimeAxis

CALLS, ROUNDS = 100, 5
CHANNELS = 64


def cases(job: Job) -> list[Case]:
    device = torch.device(job.device)
    found = {
        "Linear fp16": lambda: _float_linear(device), "Linear static": lambda: _linear(device, STATIC),
        "Linear per token": lambda: _linear(device, DYNAMIC), "Conv fp16": lambda: _float_conv(device),
        "Conv static": lambda: _conv(device, False), "Conv with its norm": lambda: _conv(device, True),
    }  # fmt: skip
    return [Case(name, lambda make=make: _measure(make, device), 60.0) for name, make in found.items()]  # type: ignore[misc]


Made = tuple[Callable[[torch.Tensor], Any], torch.Tensor, str]


def _measure(make: Callable[[], Made], device: torch.device) -> dict[str, Any]:
    call, x, backend = make()
    for _ in range(10):
        call(x)
    best = float("inf")
    for _ in range(ROUNDS):
        _wait(device)
        started = time.perf_counter()
        for _ in range(CALLS):
            call(x)
        best = min(best, time.perf_counter() - started)  # without the wait: the host's time alone
        _wait(device)
    found: dict[str, Any] = {"us": 1e6 * best / CALLS, "backend": backend}
    if device.type == "cuda":
        found |= launches(lambda: call(x))
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _state(kind: str, weight: torch.Tensor, activation: str) -> LayerState:
    scale = channel_scale(weight)
    grid: Any = (None, None)
    if activation == STATIC:
        edge = torch.full((4,), 4.0, device=weight.device)
        grid = affine_grid(-edge, edge)
    return LayerState(
        kind, Scheme(activation=activation), tuple(weight.shape), quantize_weight(weight, scale), scale, None, *grid
    )


def _clock() -> RunState:
    return RunState(TimeAxis(0.0, 999.0), Partition.uniform(4))


def _linear(device: torch.device, activation: str) -> Made:
    weight, bias = torch.randn(CHANNELS, CHANNELS, device=device), torch.randn(CHANNELS, device=device).half()
    geometry = Geometry((CHANNELS, CHANNELS))
    leaf = QuantLinear(_state("linear", weight, activation), geometry, _clock(), bias)
    x = torch.randn(2, 32, CHANNELS, device=device).half()
    return leaf, x, pick(leaf.operation, device, geometry).name


def _float_linear(device: torch.device) -> Made:
    weight = torch.randn(CHANNELS, CHANNELS, device=device).half()
    return lambda x: F.linear(x, weight), torch.randn(2, 32, CHANNELS, device=device).half(), "torch"


def _float_conv(device: torch.device) -> Made:
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3, device=device).half()
    return lambda x: F.conv2d(x, weight, padding=1), _image(device), "torch"


def _image(device: torch.device) -> torch.Tensor:
    return torch.randn(2, CHANNELS, 8, 8, device=device).half().contiguous(memory_format=torch.channels_last)


def _conv(device: torch.device, normed: bool) -> Made:
    module = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    geometry = geometry_of(module)
    assert isinstance(geometry, Geometry)
    state = _state("conv2d", module.weight.detach().to(device), STATIC)
    leaf = QuantConv2d(state, geometry, _clock(), torch.randn(CHANNELS, device=device).half())
    backend = pick(leaf.operation, device, geometry).name
    if not normed:
        return leaf, _image(device), backend
    chain = nn.Sequential(nn.GroupNorm(32, CHANNELS), nn.SiLU(), leaf).to(device).eval()
    chain[0].half()
    return lambda x: norm_silu_conv.run(chain, x), _image(device), backend
