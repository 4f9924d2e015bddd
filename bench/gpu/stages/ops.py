"""Single layers of SD1.5 and SDXL by graph replay, so that Python's time is out: ours, its parts, the vendor's; then
the product with every tile."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from bench.gpu.case import Absent, Case, Job

try:
    import triton  # noqa: F401
except ImportError:
    raise Absent("Triton is not installed") from None

from bench.gpu.launches import forced, watched
from bench.speed import layers_gpu
from bench.speed.layers_gpu import Conv, Linear
from tfmq.kernels.triton import tune as triton_tune
from tfmq.kernels.triton.tune import Machine, Shape, Tile

SHAPES: tuple[Conv | Linear, ...] = (
    Linear(8192, 640, 5120), Conv(640, 640, 64), Linear(2048, 1280, 1280), Conv(320, 320, 64), Linear(8192, 320, 2560),
    Conv(1280, 1280, 16), Linear(2048, 5120, 1280), Conv(320, 320, 128), Linear(2048, 640, 640), Conv(1280, 1280, 32),
    Linear(512, 1280, 10240), Conv(960, 320, 64, kernel=1),
)  # fmt: skip
ROUNDS, TILE_ROUNDS = 9, 3
PRODUCT = "product_w8a8"


def cases(job: Job) -> list[Case]:
    device = torch.device("cuda")
    return [Case(name(shape), partial(measure, shape, device), 40.0) for shape in SHAPES]


def name(shape: Conv | Linear) -> str:
    if isinstance(shape, Linear):
        return f"linear {shape.m} x {shape.k} x {shape.n}"
    stride = f" stride {shape.stride}" if shape.stride != 1 else ""
    return f"conv {shape.kernel} x {shape.kernel} {shape.c} -> {shape.n} at {shape.size}{stride}"


def tiles(shape: Conv | Linear, at: Machine) -> list[Tile]:
    """Those that the tuner would time for a shape, and every shipped one."""
    m, k, n = layers_gpu.product_size(shape)
    taps = shape.kernel**2 if isinstance(shape, Conv) else 1
    ordered = triton_tune.candidates(Shape("", m, n, k // taps, taps), at)
    return list(dict.fromkeys([*triton_tune._worth_timing(ordered), *triton_tune.tiles_of(at.capability)]))


def measure(shape: Conv | Linear, device: torch.device) -> dict[str, Any]:
    """`median_us` by contender; `tiles` with the time of the product alone, quickest first; `chosen` and `best`."""
    dtype = torch.float16
    contenders = layers_gpu.contenders(shape, device, dtype)
    times = layers_gpu.race(contenders, device, ROUNDS)
    median = {key: 1e6 * statistics.median(each) for key, each in times.items() if each}
    m, k, n = layers_gpu.product_size(shape)
    found: dict[str, Any] = {"median_us": median, "product": [m, k, n]}
    found["tops"] = {key: 2e-6 * m * k * n / us for key, us in median.items()}
    found["failed"] = [key for key, each in times.items() if not each]
    call, inputs = contenders[PRODUCT]
    with watched() as seen:
        call(inputs[0])
    rows = []
    for tile in dict.fromkeys([*seen, *tiles(shape, triton_tune.machine(inputs[0].device))]):
        row: dict[str, Any] = {"tile": list(tile)}
        try:
            with forced(tile):
                once = layers_gpu.timed(call, inputs, device)
            row["us"] = 1e6 * statistics.median(once() for _ in range(TILE_ROUNDS))
        except Exception as error:  # one that does not fit is told, the others go on
            if "CUDA error" in str(error):
                raise
            row["error"] = f"{type(error).__name__}: {error}"[:200]
        rows.append(row)
    timed = sorted((row for row in rows if "us" in row), key=lambda row: row["us"])
    found["tiles"] = [*timed, *(row for row in rows if "us" not in row)]
    if timed:
        found["best"] = timed[0]
        found["chosen"] = next((row for row in timed if seen and row["tile"] == list(seen[0])), None)
    return found
