"""Machine code of every Triton kernel for a GPU that is not here, by the launches that a GPU would get.

The launches of `tfmq.kernels` run on empty CPU tensors under a driver that only says which GPU it stands for; what they
would launch is compiled and measured instead. So signatures, specializations and options are those of a real run. Needs
torch and Triton alone. `bench.compile_matrix` runs it for every version of Triton, tests/unit/test_triton.py for one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from tfmq.geometry import Geometry, Norm, StaticInput
from tfmq.kernels.triton import tune as triton_tune
from tfmq.kernels.triton.tune import Machine, Tile

# Compute capability -> bytes of shared memory that one block may take (CUDA programming guide, compute capabilities)
SHARED_MEMORY = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
# Triton makes no int8 product for 7.5; what runs there is the kernels around torch's.
AROUND = {75}
SPILLED = 64  # bytes of a thread's stack that are let pass
TILE = Tile(64, 64, 64, 1, 4, 4)
HALF = torch.float16


class Case(NamedTuple):
    """A call of ours with its launches. tile: of the products; None takes the estimate's."""

    name: str
    call: Callable[[], object]
    tile: Tile | None = TILE


class Kernel(NamedTuple):
    """What became of one launch. seconds: of compiling; shared: bytes; registers: a thread's; spilled: bytes of its
    stack; failed: why there is no machine code or none that fits, or None."""

    case: str
    name: str
    capability: int
    seconds: float
    shared: int = 0
    registers: int = 0
    spilled: int = 0
    failed: str | None = None
    ptx: str = ""


def kernels(capability: int, chosen: Iterable[Case] | None = None) -> Iterator[Kernel]:
    """Compile the launches of the cases, by default of all that run on this capability, each kernel once."""
    known: set[int] = set()
    for case in cases(capability) if chosen is None else chosen:
        with launches(capability, case.tile) as made:
            start = time.perf_counter()
            try:
                case.call()
            except Exception as error:  # a compiler's errors have no base class of their own
                seconds = time.perf_counter() - start
                yield Kernel(case.name, "", capability, seconds, failed=_reason(error))
        for name, compiled, seconds in made:
            if id(compiled) in known:
                continue
            known.add(id(compiled))  # Triton keeps it, so that no other gets its number
            yield _judge(Kernel(case.name, name, capability, seconds), compiled)


@contextmanager
def launches(capability: int, tile: Tile | None) -> Iterator[list[tuple[str, Any, float]]]:
    """While open, a launch compiles and does nothing more: name, compiled kernel and seconds are in the list."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from tfmq.kernels.triton import launch as triton_launch

    made: list[tuple[str, Any, float]] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        start = time.perf_counter()
        compiled = run(self, *arguments, grid=grid, warmup=True, **more)
        made.append((self.fn.__name__, compiled, time.perf_counter() - start))
        return compiled

    at = Machine(f"sm_{capability}", (capability // 10, capability % 10), 64)
    before = driver._active if hasattr(driver, "_active") else driver.active
    driver.set_active(_Driver(capability))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(triton_launch, "machine", lambda _: at),
            mock.patch.object(triton_launch.tuner, "choose", lambda shape, *_: tile or _estimated(shape, at)),
        ):
            yield made
    finally:
        driver.set_active(before)


def _estimated(shape: triton_tune.Shape, at: Machine) -> Tile:
    return triton_tune.candidates(shape, at)[0]


class _Driver:
    """Stands for a GPU; kernels of other capabilities are kept apart by the number of the device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 1000 + self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def cases(capability: int) -> list[Case]:
    """Every operation in the forms that compile to code of their own."""
    if capability in AROUND:
        return _around()
    from tfmq.kernels.triton import backend as triton_backend

    def product(name: str, how: str, weight: Any, *rest: Any, tile: Tile | None = TILE) -> Case:
        return Case(name, lambda: getattr(triton_backend, how)(rest[0], weight, *rest[1:]), tile)

    square, wide = _linear(640, 640), _linear(1280, 640)
    three, one = _conv(320, 320, 3), _conv(320, 640, 1)
    image = torch.empty(2, 320, 64, 64, dtype=HALF)
    last = image.contiguous(memory_format=torch.channels_last)
    rows, row_bias, bias = (
        torch.empty(2, 4096, 640, dtype=HALF),
        torch.empty(1280, dtype=HALF),
        torch.empty(320, dtype=HALF),
    )
    grid, plain = _grid(640), _grid(None)
    norm = Norm(32, torch.empty(320, dtype=HALF), torch.empty(320, dtype=HALF), 1e-5)
    odd_geometry = Geometry((13, 37))
    odd = triton_backend.prepare(torch.empty(13, 37, dtype=torch.int8), torch.empty(13), odd_geometry)
    narrow = torch.empty(5, 37, dtype=torch.bfloat16)
    return [
        product("linear static", "linear_static", wide, rows, grid, row_bias),
        product("linear static, plain", "linear_static", square, rows, plain, None),
        product("linear per token", "linear_dynamic", wide, rows, grid.inverse_balance, row_bias),
        product("linear 4 bits of 32, per token", "linear_dynamic", _packed(640, 640, 0, 32), rows, None, None),
        product("linear 4 bits of 128", "linear_static", _packed(640, 640, 0, 128), rows, plain, None),
        product("conv 3 x 3", "conv2d_static", three, last, _grid(320), bias),
        product("conv 3 x 3, NCHW", "conv2d_static", three, image, plain, bias),
        product("conv 3 x 3, split", "conv2d_static", three, last, plain, bias, tile=TILE._replace(split=4)),
        product("conv 3 x 3, stride 2", "conv2d_static", _conv(320, 320, 3, 2), last, plain, bias),
        product("conv 1 x 1", "conv2d_static", one, last, plain, row_bias[:640]),
        product("conv 3 x 3, 4 bits of 64", "conv2d_static", _packed(320, 320, 3, 64), last, plain, bias),
        Case("conv behind its norm",
             lambda: triton_backend.conv2d_static_normed(last, three, _grid(320), bias, norm)),
        product("linear static, bfloat16", "linear_static", square, rows.bfloat16(), plain, row_bias[:640].bfloat16()),
        product("linear per token, float32", "linear_dynamic", square, rows.float(), None, row_bias[:640].float()),
        product("linear static, odd", "linear_static", odd, narrow, _grid(37), None),
        product("linear per token, odd", "linear_dynamic", odd, narrow, None, None),
        product("linear static, estimated tile", "linear_static", wide, rows, plain, None, tile=None),
        product("conv 3 x 3, largest tile", "conv2d_static", three, last, plain, bias, tile=largest(capability)),
    ]  # fmt: skip


def _around() -> list[Case]:
    """What runs around torch's int8 product, which is not ours; small, since a CPU computes that product."""
    from tfmq.kernels.triton import int_mm as triton_int_mm

    linear = triton_int_mm.prepare(torch.empty(64, 64, dtype=torch.int8), torch.empty(64), Geometry((64, 64)))
    geometry = Geometry((64, 32, 3, 3), padding=(1, 1))
    conv = triton_int_mm.prepare(torch.empty(geometry.shape, dtype=torch.int8), torch.empty(64), geometry)
    rows, bias = torch.empty(32, 64, dtype=HALF), torch.empty(64, dtype=HALF)
    image = torch.empty(1, 32, 8, 8, dtype=HALF)
    grid, plain = _grid(64), _grid(None)
    return [
        Case("around: linear static", lambda: triton_int_mm.linear_static(rows, linear, grid, bias)),
        Case("around: linear static, plain", lambda: triton_int_mm.linear_static(rows, linear, plain, None)),
        Case("around: linear per token", lambda: triton_int_mm.linear_dynamic(rows, linear, None, bias)),
        Case(
            "around: linear, bfloat16",
            lambda: triton_int_mm.linear_dynamic(rows.bfloat16(), linear, None, bias.bfloat16()),
        ),
        Case("around: linear, float32", lambda: triton_int_mm.linear_static(rows.float(), linear, grid, None)),
        Case("around: conv 3 x 3", lambda: triton_int_mm.conv2d_static(image, conv, plain, bias)),
    ]


def largest(capability: int) -> Tile:
    """The shipped tile that asks most of a GPU: of the largest block the one with the most shared memory."""
    tiles = triton_tune.tiles_of((capability // 10, capability % 10))
    return max(tiles, key=lambda tile: (tile.m * tile.n, tile.stages * (tile.m + tile.n) * tile.k))


def _linear(n: int, k: int) -> Any:
    from tfmq.kernels.triton import backend as triton_backend

    return triton_backend.prepare(torch.empty(n, k, dtype=torch.int8), torch.empty(n), Geometry((n, k)))


def _conv(n: int, c: int, size: int, stride: int = 1) -> Any:
    from tfmq.kernels.triton import backend as triton_backend

    geometry = Geometry((n, c, size, size), (stride, stride), (size // 2, size // 2))
    codes = torch.empty(geometry.shape, dtype=torch.int8).contiguous(memory_format=torch.channels_last)
    return triton_backend.prepare(codes, torch.empty(n), geometry)


def _packed(n: int, c: int, size: int, group: int) -> Any:
    """size: of a convolution's kernel; 0 for a Linear."""
    from tfmq.formats.int4 import Grid, Packed
    from tfmq.kernels.triton import backend as triton_backend

    shape = (n, c, size, size) if size else (n, c)
    columns = c * (size * size if size else 1)
    part = torch.zeros(n, columns // group, dtype=torch.uint8)
    packed = Packed(torch.zeros(n, columns // 2, dtype=torch.uint8), Grid(torch.empty(n), part, part, group), shape)
    return triton_backend.prepare_packed(packed, Geometry(shape, padding=(size // 2, size // 2)))


def _grid(channels: int | None) -> StaticInput:
    inverse: Tensor | None = None if channels is None else torch.empty(channels)
    return StaticInput(torch.empty(1), torch.empty(1, dtype=torch.int32), inverse)


def _judge(kernel: Kernel, compiled: Any) -> Kernel:
    """With what the machine code takes, and whether that fits."""
    shared = int(compiled.metadata.shared)
    try:
        registers, stack, local = _usage(compiled.asm["cubin"])
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return kernel._replace(shared=shared, failed=f"its machine code cannot be read ({_reason(error)})")
    failed = None
    if shared > SHARED_MEMORY[kernel.capability]:
        failed = f"{shared} bytes of shared memory, the GPU has {SHARED_MEMORY[kernel.capability]}"
    elif stack > SPILLED or local:
        failed = f"{stack + local} bytes of registers spilled"
    ptx = compiled.asm["ptx"]
    return kernel._replace(shared=shared, registers=registers, spilled=stack + local, failed=failed, ptx=ptx)


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers of a thread, bytes of its stack, bytes of local memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([_cuobjdump(), "-res-usage", str(path)], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", done.stdout)
    if found is None:
        raise ValueError("no resources in " + done.stdout[-200:])
    registers, stack, local = map(int, found.groups())
    return registers, stack, local


def _cuobjdump() -> str:
    """Triton's own, else the one of a CUDA toolkit. Raises OSError."""
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(own) if own.is_file() else shutil.which("cuobjdump")
    if found is None:
        raise OSError("there is no cuobjdump")
    return found


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return text.splitlines()[0][:300]


def main(capability: int) -> None:
    """Print the version of Triton, then every kernel, each as a line of JSON."""
    import triton

    print(json.dumps({"triton": triton.__version__}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # another run's code would take no time
        for kernel in kernels(capability):
            row = {name: value for name, value in kernel._asdict().items() if name != "ptx"}
            print(json.dumps({**row, "seconds": round(kernel.seconds, 2)}), flush=True)
