"""Every variant of the kernels that the other stages launch, compiled in as many processes as there are cores.

The variants are taken from the launch code itself: it runs on CPU tensors with the launches kept. So the later stages
find them in Triton's cache. Without a GPU a handful is compiled for ones that are not here.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.gpu.case import Absent, Case, Job
from bench.gpu.worker import spread as parallel

try:
    import triton  # noqa: F401
except ImportError:
    raise Absent("Triton is not installed") from None

from bench.gpu.launches import Launch, forced, kept
from bench.gpu.layers import Place
from bench.gpu.stages import ops, parity
from bench.gpu.truth import Silent
from bench.speed import layers_gpu, unet
from bench.speed.networks import BATCH, kept_in_float
from tfmq.geometry import Geometry, Norm, geometry_of
from tfmq.kernels.triton import backend as triton_backend
from tfmq.kernels.triton import launch
from tfmq.kernels.triton import tune as triton_tune
from tfmq.kernels.triton.tune import Machine, Shape, Tile

__all__ = ["cases", "parallel"]

LIMIT = 90.0
CPU = torch.device("cpu")
ABROAD = (86, 90)  # what a machine without a GPU compiles for
GROUP = 64  # of 4-bit weights in bench/speed/layers_gpu.py


def cases(job: Job) -> list[Case]:
    if job.device == "cuda":
        found = everything(Apart(_machine).result())
        return [
            Case(name, partial(compiled, one, None), LIMIT) for name, one in found.items()
        ]  # for the GPU that is here
    some = handful()
    return [
        Case(f"sm_{capability} {name}", partial(compiled, one, capability), LIMIT)
        for capability in ABROAD for name, one in some.items()
    ]  # fmt: skip


def compiled(one: Launch, capability: int | None) -> dict[str, Any]:
    """A case's result. capability: as in `Launch.compile`."""
    built = one.compile(capability)
    found = {"compile_s": round(built.seconds, 3), "shared": built.shared, "instruction": built.instruction}
    return {**found, "registers": built.registers, "spills": built.spilled, "unread": built.unread}


class Apart:
    """A function's result, found in a process of its own: what is forked from this one may not meet a device that is in
    use, nor modules that ask for one."""

    def __init__(self, function: Callable[[], Any]) -> None:
        read, write = os.pipe()
        self.child = os.fork()
        if not self.child:
            try:
                said = pickle.dumps((True, function()))
            except BaseException as error:
                said = pickle.dumps((False, f"{type(error).__name__}: {error}"))
            with os.fdopen(write, "wb") as stream:
                stream.write(said)
            os._exit(0)
        os.close(write)
        self.stream = os.fdopen(read, "rb")

    def result(self) -> Any:
        """Raises RuntimeError where the function raised or its process died."""
        with self.stream as stream:
            said = stream.read()
        os.waitpid(self.child, 0)
        well, found = pickle.loads(said) if said else (False, "its process died")
        if not well:
            raise RuntimeError(found)
        return found


def _machine() -> Machine:
    return triton_tune.machine(torch.device("cuda", 0))


def everything(at: Machine) -> dict[str, Launch]:
    """What the stages launch on this GPU, by name: those of `parity`, of single layers, of networks."""
    found: dict[str, Launch] = {}
    networks = [Apart(partial(layers_of, model)) for model in unet.CONFIGS]
    with torch.inference_mode(), kept(found):
        for run in parity.kernels(at.capability).values():
            run(place=Place(CPU, Silent()))
        for shape in ops.SHAPES:
            for group in (0, GROUP):
                products(shape, at, group)
        for network in networks:
            try:
                layers = network.result()
            except RuntimeError as error:  # the networks will compile theirs themselves
                print(f"the layers of a network are not known: {error}", flush=True)
                continue
            for layer in layers:
                layer.launch(at)
    return found


def products(
    shape: layers_gpu.Conv | layers_gpu.Linear, at: Machine, group: int, dtype: torch.dtype = torch.float16
) -> None:
    """Launch the product of a shape with every tile that would be timed for it, and every shipped one, on few rows;
    with a bias and, where it is a Linear in 8 bits, without, as layers for q, k and v are."""
    _, _, n = layers_gpu.product_size(shape)
    if isinstance(shape, layers_gpu.Conv):
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


@dataclass(frozen=True)
class NetworkLayer:
    """A layer that is quantized, and the shape that its input has in a step. normed: behind a norm and SiLU."""

    geometry: Geometry
    bias: bool
    normed: bool
    shape: tuple[int, ...]

    def launch(self, at: Machine, dtype: torch.dtype = torch.float16) -> None:
        """With every tile that would be timed for it; an image also as the host's layout has it."""
        n, c = self.geometry.shape[:2]
        size = self.geometry.output_size(*self.shape[2:]) if self.geometry.is_conv else self.shape[1:-1]
        m, taps = math.prod((self.shape[0], *size)), math.prod(self.geometry.shape[2:])
        tiles = triton_tune._worth_timing(triton_tune.candidates(Shape("", m, n, c, taps), at))
        weight, grid = _weight(self.geometry, 0), Place(CPU, Silent()).grid()
        bias = torch.empty(n, dtype=dtype) if self.bias else None
        for tile in tiles:
            with forced(tile):
                if not self.geometry.is_conv:
                    triton_backend.linear_static(torch.empty(self.shape, dtype=dtype), weight, grid, bias)
                    continue
                for order in (torch.channels_last, torch.contiguous_format):
                    x = torch.empty(self.shape, dtype=dtype, memory_format=order)
                    if self.normed:
                        norm = Norm(32, torch.empty(c, dtype=dtype), torch.empty(c, dtype=dtype), 1e-5)
                        triton_backend.conv2d_static_normed(x, weight, grid, bias, norm)
                    else:
                        triton_backend.conv2d_static(x, weight, grid, bias)


def layers_of(model: str) -> list[NetworkLayer]:
    """Those of a network of bench/speed/unet.py, each kind once, in the order of a step."""
    config = unet.CONFIGS[model]
    with torch.device("meta"):
        network = unet.UNetModel(config).half()
    keep = kept_in_float(network)
    chains = [chain for m in network.modules() if isinstance(m, unet.ResBlock) for chain in (m.in_layers, m.out_layers)]
    normed = {id(chain[-1]) for chain in chains}
    found: dict[NetworkLayer, None] = {}

    def look(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        geometry = geometry_of(module)
        if isinstance(geometry, Geometry):
            bias = getattr(module, "bias", None) is not None
            found[NetworkLayer(geometry, bias, id(module) in normed, tuple(given[0].shape))] = None

    for path, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and path not in keep:
            module.register_forward_pre_hook(look)
    network(*unet.inputs(config, BATCH, torch.float16, torch.device("meta")))
    return list(found)


def _weight(geometry: Geometry, group: int) -> launch.Prepared:
    """As `backend.prepare` makes it, of nothing: only types, shapes and addresses count."""
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
