"""Time per operation on a GPU: our int8 and int4 layers, torch's integer product of the same size, 16-bit layers.

`python -m bench.speed_ops --json F` needs torch, triton and numpy only. Shapes: SD1.5 at 512 x 512 and SDXL at
1024 x 1024, batch 2. Every contender is captured in a CUDA graph of several calls over inputs that together exceed the
cache, so that neither Python nor a warm cache counts; the contenders take turns, and medians are reported.

`--smoke` runs tiny shapes, on a CPU in Triton's interpreter: it shows that the benchmark works and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROUNDS = 15
CALLS = 10  # per graph
MOST_INPUTS = 8


@dataclass(frozen=True)
class Conv:
    """x [batch, c, size, size], weight [n, c, kernel, kernel], padding kernel // 2."""

    c: int
    n: int
    size: int
    kernel: int = 3
    stride: int = 1
    batch: int = 2


@dataclass(frozen=True)
class Linear:
    """x [m, k], weight [n, k]."""

    m: int
    k: int
    n: int


SHAPES: dict[str, tuple[Conv | Linear, ...]] = {
    "sd15": (
        Conv(320, 320, 64), Conv(960, 320, 64), Conv(320, 320, 64, stride=2), Conv(640, 640, 32), Conv(1920, 640, 32),
        Conv(1280, 1280, 16), Conv(2560, 1280, 16), Conv(1280, 1280, 8), Conv(2560, 1280, 8),
        Conv(320, 320, 64, kernel=1), Conv(960, 320, 64, kernel=1), Conv(2560, 1280, 16, kernel=1),
        Linear(8192, 320, 320), Linear(8192, 320, 2560), Linear(8192, 1280, 320), Linear(2048, 640, 640),
        Linear(2048, 640, 5120), Linear(2048, 2560, 640), Linear(512, 1280, 1280), Linear(512, 1280, 10240),
        Linear(512, 5120, 1280), Linear(154, 768, 320),
    ),
    "sdxl": (
        Conv(320, 320, 128), Conv(960, 320, 128), Conv(320, 320, 128, stride=2), Conv(640, 640, 64),
        Conv(1920, 640, 64), Conv(1280, 1280, 32), Conv(2560, 1280, 32), Conv(960, 640, 64, kernel=1),
        Linear(8192, 640, 640), Linear(8192, 640, 5120), Linear(8192, 2560, 640), Linear(2048, 1280, 1280),
        Linear(2048, 1280, 10240), Linear(2048, 5120, 1280), Linear(154, 2048, 1280),
    ),
}  # fmt: skip
SMOKE: dict[str, tuple[Conv | Linear, ...]] = {
    "smoke": (Conv(32, 16, 4), Conv(32, 16, 5, stride=2), Conv(32, 16, 4, kernel=1), Linear(24, 64, 32))
}
OURS = "ours_w8a8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="not used")
    parser.add_argument("--prompts", help="not used")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--models", default="sd15,sdxl", help="which shapes, separated by commas")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that the benchmark runs")
    parser.add_argument("--json", type=Path, help="write the results there")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        if not arguments.smoke:
            parser.error("on a CPU only --smoke runs: these kernels are for GPUs")
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
        from bench.gpu.interpreted import mend

        mend()
    shapes = SMOKE if arguments.smoke else {name: SHAPES[name] for name in arguments.models.split(",")}
    found = measure(shapes, arguments.device, arguments.dtype, 2 if arguments.smoke else ROUNDS)
    if arguments.json:
        from tfmq import atomic

        atomic.write_bytes(arguments.json, f"{json.dumps(found, indent=1)}\n".encode())


def measure(
    shapes: dict[str, tuple[Conv | Linear, ...]], device_name: str, dtype_name: str, rounds: int
) -> dict[str, Any]:
    """Everything that is written to the JSON: `device`, and per model `ops` and `mean_ratio` (geometric)."""
    import torch
    import triton

    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    out: dict[str, Any] = {"device": describe(device), "torch": torch.__version__, "triton": triton.__version__}
    out |= {"dtype": dtype_name, "rounds": rounds, "models": {}}
    for model, layers in shapes.items():
        operations = []
        for shape in layers:
            with torch.inference_mode():
                operations.append(_operation(shape, device, dtype, rounds))
            print(_line(model, operations[-1]), flush=True)
        ratios: dict[str, list[float]] = {}
        for operation in operations:
            for name, ratio in operation["ratio"].items():
                ratios.setdefault(name, []).append(ratio)
        means = {name: math.exp(statistics.fmean(map(math.log, values))) for name, values in ratios.items()}
        out["models"][model] = {"ops": operations, "mean_ratio": means}
        print(f"{model}: mean time over {OURS}: " + ", ".join(f"{n} {r:.2f}" for n, r in means.items()), flush=True)
    return out


def _operation(shape: Conv | Linear, device: Any, dtype: Any, rounds: int) -> dict[str, Any]:
    m, k, n = product_size(shape)
    times = race(contenders(shape, device, dtype), device, rounds)
    median = {name: statistics.median(values) for name, values in times.items() if values}
    failed = [name for name, values in times.items() if not values]
    ratio = {
        name: statistics.median(t / o for t, o in zip(times[name], times[OURS], strict=True))
        for name in median
        if name != OURS and OURS in median
    }
    result: dict[str, Any] = {"kind": type(shape).__name__.lower(), **asdict(shape), "product": [m, k, n]}
    result |= {"median_us": {name: 1e6 * t for name, t in median.items()}, "ratio": ratio, "failed": failed}
    result["tops"] = {name: 2e-12 * m * k * n / t for name, t in median.items()}
    if "int_mm" in median and "product_w8a8" in median:
        result["product_rate_over_int_mm"] = median["int_mm"] / median["product_w8a8"]
    return result


def product_size(shape: Conv | Linear) -> tuple[int, int, int]:
    """Rows, columns that are summed, and outputs of the matrix product."""
    if isinstance(shape, Linear):
        return shape.m, shape.k, shape.n
    side = (shape.size + 2 * (shape.kernel // 2) - shape.kernel) // shape.stride + 1
    return shape.batch * side * side, shape.c * shape.kernel**2, shape.n


def contenders(shape: Conv | Linear, device: Any, dtype: Any) -> dict[str, tuple[Callable[[Any], Any], list[Any]]]:
    """name -> (a call, its inputs). `product_*` starts from codes; `int_mm` is torch's product of the same size."""
    import torch
    from torch.nn import functional as F

    from tfmq.formats import int4
    from tfmq.formats.affine import affine_grid, channel_scale, quantize_weight
    from tfmq.geometry import Geometry, StaticInput
    from tfmq.kernels.triton import backend as triton_backend
    from tfmq.kernels.triton import launch as triton_launch

    g = torch.Generator(device=device).manual_seed(0)
    conv = isinstance(shape, Conv)
    if isinstance(shape, Conv):
        size, padding = (shape.kernel,) * 2, (shape.kernel // 2,) * 2
        geometry = Geometry((shape.n, shape.c, *size), (shape.stride,) * 2, padding)
        x_shape: tuple[int, ...] = (shape.batch, shape.c, shape.size, shape.size)
        output = (shape.batch, *geometry.output_size(shape.size, shape.size))
    else:
        geometry, x_shape = Geometry((shape.n, shape.k)), (shape.m, shape.k)

    inputs = []
    for _ in range(_input_count(2 * math.prod(x_shape), device)):
        x = torch.randn(x_shape, generator=g, device=device).to(dtype)
        inputs.append(x.contiguous(memory_format=torch.channels_last) if conv else x)
    weight = torch.randn(geometry.shape, generator=g, device=device) / math.sqrt(math.prod(geometry.shape[1:]))
    bias = torch.randn(geometry.shape[0], generator=g, device=device).to(dtype)
    scale = channel_scale(weight)
    eight = triton_backend.prepare(quantize_weight(weight, scale), scale, geometry)
    group = int4.group_for(geometry.shape[1], 64)
    columns = int4.to_columns(weight)
    grid4 = int4.search_grid(columns, group, symmetric=True)
    packed = int4.Packed(int4.pack(int4.nearest(columns, grid4)), grid4, geometry.shape)
    four = triton_backend.prepare_packed(packed, geometry)
    edge = torch.tensor([4.0], device=device)
    grid = StaticInput(*affine_grid(-edge, edge), None)
    half = weight.to(dtype)

    m, k, n = product_size(shape)
    a = [torch.randint(-127, 128, (m, k), generator=g, device=device).to(torch.int8) for _ in inputs[:3]]
    b = torch.randint(-127, 128, (n, k), generator=g, device=device).to(torch.int8).t()
    found: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {"int_mm": (lambda q: torch._int_mm(q, b), a)}
    if conv:
        run = triton_backend.conv2d_static
        half = half.contiguous(memory_format=torch.channels_last)
        more = (geometry.stride, geometry.padding)
        codes = [triton_launch.quantize_image(x, grid, eight.channels, geometry.padding) for x in inputs]
        found[dtype_name(dtype)] = (lambda x: F.conv2d(x, half, bias, *more), inputs)
        found["product_w8a8"] = (
            lambda q: triton_launch.product(q, eight, grid, None, bias, dtype, output), codes,
        )  # fmt: skip
        found["quantize"] = (
            lambda x: triton_launch.quantize_image(x, grid, eight.channels, geometry.padding), inputs,
        )  # fmt: skip
    else:
        run = triton_backend.linear_static
        codes = [triton_launch.quantize_matrix(x, grid, eight.channels) for x in inputs]
        found[dtype_name(dtype)] = (lambda x: F.linear(x, half, bias), inputs)
        found["product_w8a8"] = (lambda q: triton_launch.product(q, eight, grid, None, bias, dtype), codes)
        found["quantize"] = (lambda x: triton_launch.quantize_matrix(x, grid, eight.channels), inputs)
        found["ours_w8a8_per_token"] = (lambda x: triton_backend.linear_dynamic(x, eight, None, bias), inputs)
    found[OURS] = (lambda x: run(x, eight, grid, bias), inputs)
    if conv:  # as the host leaves an image at the end of every transformer
        there = [x.contiguous() for x in inputs]
        plain = weight.to(dtype)
        found[f"{dtype_name(dtype)}_nchw"] = (lambda x: F.conv2d(x, plain, bias, *more), there)
        found[f"{OURS}_nchw"] = (lambda x: run(x, eight, grid, bias), there)
    found["ours_w4a8"] = (lambda x: run(x, four, grid, bias), inputs)
    return found


def dtype_name(dtype: Any) -> str:
    """As in the other speed benchmark: fp16, bf16."""
    return {"torch.float16": "fp16", "torch.bfloat16": "bf16"}[str(dtype)]


def _input_count(size: int, device: Any) -> int:
    """How many inputs of `size` bytes exceed the cache twice."""
    import torch

    if device.type != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    return max(2, min(MOST_INPUTS, -(-2 * cache // size)))


def race(
    contenders: dict[str, tuple[Callable[[Any], Any], list[Any]]], device: Any, rounds: int
) -> dict[str, list[float]]:
    """Seconds per call, one entry per round; the contenders take turns. Empty for one that does not run."""
    ready: dict[str, Callable[[], float]] = {}
    for name, (call, inputs) in contenders.items():
        try:
            ready[name] = timed(call, inputs, device)
        except Exception as error:  # sizes that the vendor's library does not take; out of memory; Triton's own kinds
            print(f"  {name} does not run: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, one in ready.items():
            times[name].append(one())
    return times


def timed(call: Callable[[Any], Any], inputs: list[Any], device: Any) -> Callable[[], float]:
    """A function that runs `call` several times and returns seconds per call."""
    import torch

    if device.type != "cuda":
        call(inputs[0])

        def once() -> float:
            start = time.perf_counter()
            call(inputs[0])
            return time.perf_counter() - start

        return once
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles and times its tiles, which a capture must not do
        for x in inputs[:2]:
            call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(inputs[i % len(inputs)])
    graph.replay()
    torch.cuda.synchronize()

    def replay() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / CALLS

    return replay


def describe(device: Any) -> dict[str, Any]:
    import torch

    if device.type != "cuda":
        return {"name": "Triton's interpreter: these times mean nothing"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "processors": properties.multi_processor_count,
    }


def _line(model: str, operation: dict[str, Any]) -> str:
    what = {key: operation[key] for key in ("c", "n", "size", "kernel", "stride", "m", "k") if key in operation}
    shape = " ".join(f"{key} {value}" for key, value in what.items())
    micro = ", ".join(f"{name} {value:.1f}" for name, value in operation["median_us"].items())
    return f"{model} {operation['kind']} {shape}: {micro} us"
