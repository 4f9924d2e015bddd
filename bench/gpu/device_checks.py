"""What only a GPU has: streams, graphs, tensors of more than 2^31 entries. Each check takes the place to run at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu.case import Absent
from bench.gpu.checks import PLAIN
from bench.gpu.launches import forced
from bench.gpu.layers import Place
from tfmq.geometry import Geometry, Norm
from tfmq.kernels.triton import backend as triton_backend
from tfmq.kernels.triton.tune import Tile

LARGE = Tile(128, 128, 64, 1, 8, 3)
GIB = 1 << 30
ROWS, WIDTH = (2**31 + 2**27) // 1280, 1280  # more than 2^31 entries
NAMES = ("static", "per token", "4 bits", "conv", "normed conv")


def _some(place: Place) -> tuple[list[Tensor], Callable[[list[Tensor]], list[Tensor]]]:
    """Inputs, and a function of them that runs every kind of layer."""
    dtype = torch.float16
    linear, conv = place.layer(Geometry((320, 640))), place.layer(Geometry((128, 64, 3, 3), padding=(1, 1)))
    four = place.layer(Geometry((320, 640)), 64)
    grid, image_grid = place.grid(640), place.grid(64)
    norm = Norm(32, place.normal(64, dtype=dtype), place.normal(64, dtype=dtype), 1e-5)
    bias = place.normal(320, dtype=dtype)

    def run(x: list[Tensor]) -> list[Tensor]:
        b = triton_backend
        return [
            b.linear_static(x[0], linear.weight, grid, bias), b.linear_dynamic(x[0], linear.weight, None, bias),
            b.linear_static(x[0], four.weight, grid, None), b.conv2d_static(x[1], conv.weight, image_grid, None),
            b.conv2d_static_normed(x[1], conv.weight, image_grid, None, norm),
        ]  # fmt: skip

    return [place.normal(512, 640, dtype=dtype), place.image(2, 64, 32, 32, dtype)], run


def second_stream(*, place: Place) -> None:
    """The same on another stream, while this one works."""
    x, run = _some(place)
    with forced(PLAIN._replace(split=2)):
        expected = run(x)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        busy = place.normal(4096, 4096, dtype=torch.float16)
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        with torch.cuda.stream(side):
            found = [run(x) for _ in range(5)]
        torch.cuda.synchronize()
    for turn in found:
        for what, y, other in zip(NAMES, turn, expected, strict=True):
            place.judge.equal(f"{what} on a second stream", y, other)


def graph(*, place: Place) -> None:
    """A captured CUDA graph, replayed on other inputs than those that it was captured with, gives what eager gives."""
    x, run = _some(place)
    others = [place.normal(*t.shape, dtype=t.dtype) for t in x]
    with forced(PLAIN._replace(split=2)):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(x)
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = run(x)
        for inputs in (others, [t.clone() for t in x]):
            for into, source in zip(x, inputs, strict=True):
                into.copy_(source)
            captured.replay()
            torch.cuda.synchronize()
            for what, y, other in zip(NAMES, out, run(inputs), strict=True):
                place.judge.equal(f"{what} in a graph", y, other)


def _room(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        raise Absent(f"needs {gib:g} GiB of free memory on the GPU, {free:.1f} are")


def _ends(m: int, k: int) -> Tensor:
    """Numbers of rows: the first, those around entry 2^31, the last."""
    middle = 2**31 // k
    return torch.cat([torch.arange(40), torch.arange(middle - 20, min(m, middle + 20)), torch.arange(m - 40, m)])


def large_rows(*, place: Place) -> None:
    """An input of more than 2^31 entries, static and per token."""
    _room(16)
    x = torch.randn(ROWS, WIDTH, generator=place.generator, device=place.device, dtype=torch.float16)
    layer, grid = place.layer(Geometry((16, WIDTH))), place.grid(WIDTH)
    some = _ends(ROWS, WIDTH).to(place.device)
    few = Place(place.device, place.judge)
    with forced(LARGE):
        static = triton_backend.linear_static(x, layer.weight, grid, None)[some]
        dynamic = triton_backend.linear_dynamic(x, layer.weight, grid.inverse_balance, None)[some]
        part = x[some]
        place.judge.equal("static", static, few.check_linear("static", layer, part, grid, None))
        place.judge.equal("per token", dynamic, few.check_linear("per token", layer, part, grid, None, dynamic=True))


def large_result(*, place: Place) -> None:
    """A result of more than 2^31 entries."""
    _room(16)
    layer, grid = place.layer(Geometry((WIDTH, 64))), place.grid(64)
    x = place.normal(ROWS, 64, dtype=torch.float16)
    some = _ends(ROWS, WIDTH).to(place.device)
    with forced(LARGE):
        y = triton_backend.linear_static(x, layer.weight, grid, None)[some]
        place.judge.equal("result", y, place.check_linear("few", layer, x[some], grid, None))


def large_image(*, place: Place) -> None:
    """A convolution of an image of more than 2^31 entries: its last corner."""
    _room(20)
    side, c, n = 5824, 64, 16
    x = torch.empty(1, c, side, side, device=place.device, dtype=torch.float16, memory_format=torch.channels_last)
    x.normal_(generator=place.generator)
    geometry = Geometry((n, c, 3, 3), padding=(1, 1))
    layer, grid = place.layer(geometry), place.grid(c)
    with forced(LARGE):
        y = triton_backend.conv2d_static(x, layer.weight, grid, None)[:, :, -20:, -20:]
        corner = place.check_conv("corner", layer, x[:, :, -21:, -21:].contiguous(), grid, None)
        place.judge.equal("corner", y.contiguous(), corner[:, :, 1:, 1:].contiguous())


ALL = {
    "second stream": second_stream, "graph": graph, "large rows": large_rows, "large result": large_result,
    "large image": large_image,
}  # fmt: skip
