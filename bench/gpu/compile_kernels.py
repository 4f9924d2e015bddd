"""Machine code of every Triton kernel for a GPU that is not here, by the launches that a GPU would get.

The launches of `tfmq.kernels` are made on empty CPU tensors and kept; each is then compiled and measured under a driver
that only says which GPU it stands for (`bench.gpu.launches`). So signatures, specializations and options are those of a
real run. Needs torch and Triton alone. `bench.compile_matrix` runs it for every version of Triton,
tests/unit/test_triton.py for one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu.launches import Built, Launch, choosing, kept
from tfmq.geometry import Geometry, Norm, StaticInput
from tfmq.kernels.triton import tune as triton_tune
from tfmq.kernels.triton.tune import Machine, Tile

# Compute capability -> bytes of shared memory that one block may take (CUDA programming guide, compute capabilities)
SHARED_MEMORY = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
# Triton makes no int8 product for 7.5; what runs there is the kernels around torch's.
AROUND = {75}
SPILLED = 64  # bytes of a thread that are let pass
TILE = Tile(64, 64, 64, 1, 4, 4)
HALF = torch.float16


class Case(NamedTuple):
    """A call of ours with its launches. tile: of the products; None takes the estimate's."""

    name: str
    call: Callable[[], object]
    tile: Tile | None = TILE


class Kernel(NamedTuple):
    """What became of one launch. failed: why there is no machine code or none that fits, or None."""

    case: str
    name: str
    capability: int
    built: Built | None = None
    failed: str | None = None


def kernels(capability: int, chosen: Iterable[Case] | None = None) -> Iterator[Kernel]:
    """Compile the launches of the cases, by default of all that run on this capability, each kernel once."""
    at = Machine(f"sm_{capability}", (capability // 10, capability % 10), 64)
    known: dict[str, Launch] = {}
    for case in cases(capability) if chosen is None else chosen:
        made: dict[str, Launch] = {}
        try:
            with kept(made), choosing(lambda shape, *_, tile=case.tile: tile or triton_tune.candidates(shape, at)[0]):
                case.call()
        except Exception as error:  # whatever it is: the others go on
            yield Kernel(case.name, "", capability, failed=_reason(error))
        for launch in [made[name] for name in made if name not in known]:
            yield _judged(Kernel(case.name, launch.kernel.__name__, capability), launch)
        known |= made


def _judged(kernel: Kernel, launch: Launch) -> Kernel:
    """With what the machine code takes, and whether that fits."""
    try:
        built = launch.compile(kernel.capability)
    except Exception as error:  # a compiler's errors have no base class of their own
        return kernel._replace(failed=_reason(error))
    failed = None
    if built.shared > SHARED_MEMORY[kernel.capability]:
        failed = f"{built.shared} bytes of shared memory, the GPU has {SHARED_MEMORY[kernel.capability]}"
    elif built.spilled is None:
        failed = f"its machine code cannot be read ({built.unread})"
    elif built.spilled > SPILLED:
        failed = f"{built.spilled} bytes of registers spilled"
    return kernel._replace(built=built, failed=failed)


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


def _reason(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return text.splitlines()[0][:300]


def main(capability: int) -> None:
    """Print the version of Triton, then every kernel, each as a line of JSON."""
    import triton

    print(json.dumps({"triton": triton.__version__}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # another run's code would take no time
        for case, name, _, built, failed in kernels(capability):
            row: dict[str, Any] = {"case": case, "name": name, "failed": failed, "seconds": 0.0}
            if built is not None:
                row |= {"seconds": round(built.seconds, 2), "registers": built.registers, "spilled": built.spilled}
            print(json.dumps(row), flush=True)
