"""Every variant of the kernels that the other stages launch, compiled in as many processes as there are cores.

The variants are taken from the launch code itself: it runs on CPU tensors with the launches kept. So the later stages
find them in Triton's cache. Without a GPU a handful is compiled for ones that are not here.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import torch

from bench.gpu.case import Absent, Case, Job
from bench.gpu.worker import spread as parallel

try:
    import triton  # noqa: F401
except ImportError:
    raise Absent("Triton is not installed") from None

from bench import speed_ops
from bench.gpu.launches import Launch, forced, kept
from bench.gpu.layers import Place
from bench.gpu.stages import ops, parity
from bench.gpu.truth import Silent
from tfmq.kernels import triton_launch as launch
from tfmq.kernels import triton_tune
from tfmq.kernels.geometry import Geometry
from tfmq.kernels.triton_tune import Machine, Tile

__all__ = ["cases", "parallel"]

LIMIT = 90.0
CPU = torch.device("cpu")
ABROAD = (86, 90)  # what a machine without a GPU compiles for
GROUP = 64  # of 4-bit weights in speed_ops


def cases(job: Job) -> list[Case]:
    if job.device == "cuda":
        at = _machine()
        found = everything(at)
        return [
            Case(name, partial(one.compile, None), LIMIT) for name, one in found.items()
        ]  # for the GPU that is here
    some = handful()
    return [
        Case(f"sm_{capability} {name}", partial(one.compile, capability), LIMIT)
        for capability in ABROAD for name, one in some.items()
    ]  # fmt: skip


def _machine() -> Machine:
    """Asked in a process of its own: what is forked later may not meet a device that is in use."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            text = repr(tuple(triton_tune.machine(torch.device("cuda", 0))))
        except Exception as error:
            text = repr(str(error))
        os.write(write, text.encode())
        sys.stdout.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        said = stream.read().decode()
    os.waitpid(child, 0)
    import ast

    found = ast.literal_eval(said)
    if isinstance(found, str):
        raise RuntimeError(f"the GPU cannot be asked: {found}")
    return Machine(*found)


def everything(at: Machine) -> dict[str, Launch]:
    """What the stages launch on this GPU, by name: those of `parity`, of single layers, of networks."""
    found: dict[str, Launch] = {}
    with torch.inference_mode(), kept(found):
        for run in parity.kernels(at.capability).values():
            run(place=Place(CPU, Silent()))
        for shape in ops.SHAPES:
            for group in (0, GROUP):
                products(shape, at, group)
        for shape in dict.fromkeys(shape for shapes in speed_ops.SHAPES.values() for shape in shapes):
            products(shape, at, 0)
    return found


def products(
    shape: speed_ops.Conv | speed_ops.Linear, at: Machine, group: int, dtype: torch.dtype = torch.float16
) -> None:
    """Launch the product of a shape with every tile that would be timed for it, and every shipped one, on few rows;
    with a bias and, where it is a Linear in 8 bits, without, as layers for q, k and v are."""
    _, _, n = speed_ops.product_size(shape)
    if isinstance(shape, speed_ops.Conv):
        c = shape.c
        geometry = Geometry((n, c, shape.kernel, shape.kernel), (shape.stride,) * 2, (shape.kernel // 2,) * 2)
    else:
        c, geometry = shape.k, Geometry((n, shape.k))
    place = Place(CPU, Silent())
    weight = _weight(geometry, group)
    grid, bias = place.grid(), torch.empty(n, dtype=dtype)
    for tile in ops.tiles(shape, at):
        with forced(tile):
            if geometry.is_conv:
                few = 2 * shape.kernel, 16 + 2 * (shape.kernel // 2)  # type: ignore[union-attr]
                q = torch.empty(1, *few, c, dtype=torch.int8)
                size = (1, *Geometry(geometry.shape, geometry.stride).output_size(*few))
                launch.product(q, weight, grid, None, bias, dtype, size)
            else:
                q = torch.empty(16, c, dtype=torch.int8)
                launch.product(q, weight, grid, None, bias, dtype)
                if not group:
                    launch.product(q, weight, grid, None, None, dtype)


def _weight(geometry: Geometry, group: int) -> launch.Prepared:
    """As `triton_backend.prepare` makes it, of nothing: only types, shapes and addresses count."""
    n = geometry.shape[0]
    columns = geometry.shape[1] * (geometry.shape[2] * geometry.shape[3] if geometry.is_conv else 1)
    scale, sums = torch.empty(n), torch.empty(n, dtype=torch.int32)
    if not group:
        return launch.Prepared(torch.empty(n, columns, dtype=torch.int8), scale, sums, None, None, 0, geometry)
    codes = torch.empty(n, columns // 2, dtype=torch.uint8)
    factor, zero = (torch.empty(n, columns // group, dtype=torch.uint8) for _ in range(2))
    return launch.Prepared(codes, scale, sums, factor, zero, group, geometry)


def handful() -> dict[str, Launch]:
    """One product in 8 bits, one in 4, one quantization."""
    found: dict[str, Launch] = {}
    with kept(found), forced(Tile(64, 64, 64, 1, 4, 4)):
        for geometry, group in ((Geometry((64, 64, 3, 3)), 0), (Geometry((64, 64)), 32)):
            weight, grid = _weight(geometry, group), Place(CPU, Silent()).grid()
            q = torch.empty((1, 6, 6, 64) if geometry.is_conv else (16, 64), dtype=torch.int8)
            size: Any = (1, 4, 4) if geometry.is_conv else None
            launch.product(q, weight, grid, None, torch.empty(64, dtype=torch.float16), torch.float16, size)
        launch.quantize_matrix(torch.empty(16, 64, dtype=torch.float16), grid, 64)
    return found
