"""Time of single layers on a CPU: ours W8A8 against bfloat16 and float32, at the shapes of SD1.5 and SDXL, batch 2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.speed.layers_gpu import SHAPES, Conv
from tfmq.formats.affine import affine_grid, channel_scale, quantize_weight
from tfmq.geometry import Geometry, StaticInput
from tfmq.kernels.table import CONV2D_STATIC, LINEAR_DYNAMIC, LINEAR_STATIC, pick

ROUNDS = 5


def operations(model: str) -> dict[str, dict[str, float]]:
    """Layer in words -> contender -> median milliseconds; `tops` of ours: 10^12 additions and products a second."""
    table = {}
    for shape in SHAPES[model]:
        if isinstance(shape, Conv):
            c, n, k = shape.c, shape.n, shape.kernel
            geometry = Geometry((n, c, k, k), (shape.stride,) * 2, (k // 2,) * 2)
            x = torch.randn(shape.batch, c, shape.size, shape.size).contiguous(memory_format=torch.channels_last)
            words = f"conv {k}x{k} {c} -> {n} at {shape.size} x {shape.size}, stride {shape.stride}"
            count = shape.batch * c * n * k * k * (shape.size // shape.stride) ** 2
        else:
            geometry, x = Geometry((shape.n, shape.k)), torch.randn(shape.m, shape.k)
            words, count = f"linear {shape.m} x {shape.k} -> {shape.n}", shape.m * shape.k * shape.n
        contenders = _contenders(geometry, x)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(ROUNDS + 1):
            for name, call in contenders.items():
                start = time.perf_counter()
                call()
                if turn:
                    times[name].append(time.perf_counter() - start)
        row = {f"{name}_ms": 1e3 * statistics.median(t) for name, t in times.items()}
        table[words] = {**row, "tops": 2e-9 * count / row["ours_w8a8_ms"]}
    return table


def _contenders(geometry: Geometry, x: Tensor) -> dict[str, Callable[[], Any]]:
    weight = torch.randn(geometry.shape) / geometry.shape[1] ** 0.5
    scale = channel_scale(weight)
    codes = quantize_weight(weight, scale)
    grid = StaticInput(*affine_grid(x.amin().reshape(1), x.amax().reshape(1)), None)
    half, half_weight = x.bfloat16(), weight.bfloat16()
    static = pick(CONV2D_STATIC if geometry.is_conv else LINEAR_STATIC, x.device, geometry)
    prepared = static.module.prepare(codes, scale, geometry)
    if geometry.is_conv:
        half_weight = half_weight.contiguous(memory_format=torch.channels_last)
        g = geometry.stride, geometry.padding
        return {
            "fp32": lambda: F.conv2d(x, weight, None, *g),
            "bf16": lambda: F.conv2d(half, half_weight, None, *g),
            "ours_w8a8": lambda: static.module.conv2d_static(half, prepared, grid, None),
        }
    rows = pick(LINEAR_DYNAMIC, x.device, geometry)
    by_row = prepared if rows is static else rows.module.prepare(codes, scale, geometry)
    return {
        "fp32": lambda: F.linear(x, weight),
        "bf16": lambda: F.linear(half, half_weight),
        "ours_w8a8": lambda: static.module.linear_static(half, prepared, grid, None),
        "ours_w8a8_per_token": lambda: rows.module.linear_dynamic(half, by_row, None, None),
    }
