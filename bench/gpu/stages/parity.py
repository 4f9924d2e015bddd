"""Every kernel in every dtype on odd shapes against float64, every shipped tile, and what only a GPU has: streams,
graphs, addresses that are off, tensors of more than 2^31 bytes. On a CPU: the same in the interpreter at toy sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu.case import Absent, Case, Job, Wrong

try:
    import triton  # noqa: F401
except ImportError:
    raise Absent("Triton is not installed") from None

from bench.gpu import interpreted
from bench.gpu.launches import forced
from bench.gpu.layers import DTYPES, Place, odd_from
from bench.gpu.truth import NORM_SLACK, product_sums
from tfmq.geometry import Geometry, Norm
from tfmq.kernels.triton import backend as triton_backend
from tfmq.kernels.triton import launch
from tfmq.kernels.triton import tune as triton_tune
from tfmq.kernels.triton.tune import Tile

# On Hopper a program of 4 warps and 64 rows multiplies with wgmma, one of 32 rows or of 2 warps with mma.sync, which is
# what GPUs for consumers have.
PLAIN, SYNC = Tile(64, 64, 64, 1, 4, 4), Tile(32, 64, 64, 1, 4, 4)
SYNC_TILES = (
    SYNC, Tile(32, 128, 64, 1, 4, 3), Tile(32, 64, 128, 1, 4, 3), Tile(64, 64, 64, 1, 2, 4), Tile(64, 128, 64, 1, 2, 3),
)  # fmt: skip
TOY = Tile(32, 32, 64, 1, 4, 2)
LARGE = Tile(128, 128, 64, 1, 8, 3)
GIB = 1 << 30


def cases(job: Job) -> list[Case]:
    if job.device == "cpu":
        interpreted.install()
        return [Case(name, partial(_judged, case, torch.device("cpu")), 30.0) for name, case in toys().items()]
    device = torch.device("cuda")
    capability = torch.cuda.get_device_capability(device)
    found = [Case(name, partial(_judged, case, device)) for name, case in kernels(capability).items()]
    more = {
        "second stream": second_stream, "graph": graph, "large rows": large_rows, "large result": large_result,
        "large image": large_image,
    }  # fmt: skip
    return found + [Case(name, partial(_judged, case, device), 30.0) for name, case in more.items()]


Parity = Callable[..., None]  # takes `place`


def _judged(case: Parity, device: torch.device) -> dict[str, Any]:
    place = Place(device)
    try:
        case(place=place)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"worst": place.judge.worst}


def kernels(capability: tuple[int, int]) -> dict[str, Parity]:
    """Those that need nothing of a GPU but that it computes; the stage `compile` makes their variants."""
    found: dict[str, Parity] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        # Whatever Triton compiles anew takes a second of a core: one dtype gets all shapes, the others half of them.
        whole = dtype == torch.float16
        found[f"codes {name}"] = partial(codes, dtype, None if whole else 3)
        found[f"rows {name}"] = partial(rows, dtype)
        found[f"norms {name}"] = partial(norms, dtype, None if whole else 3)
        for tile, kind in ((PLAIN, ""), (SYNC, " mma.sync")):
            some = None if whole and tile == PLAIN else 3
            found[f"linear {name}{kind}"] = partial(linears, dtype, tile, some)
            found[f"conv {name}{kind}"] = partial(convolutions, dtype, tile, some)
            found[f"int4 {name}{kind}"] = partial(
                four_bits, dtype, tile, (16, 32, 64, 128) if some is None else (32, 128)
            )
    found["views"], found["layouts"] = views, layouts
    for tile in triton_tune.tiles_of(capability):
        found[f"tile {_text(tile)}"] = partial(one_tile, tile)
    for tile in SYNC_TILES:
        found.setdefault(f"mma.sync tile {_text(tile)}", partial(one_tile, tile))
    return found


def toys() -> dict[str, Parity]:
    """The same code in the interpreter, as far as some seconds reach."""
    half, single = torch.float16, torch.float32
    return {
        "codes float16": partial(codes, half, 1), "rows bfloat16": partial(rows, torch.bfloat16, (1, 70)),
        "norms float32": partial(norms, single, 1), "linear float16": partial(linears, half, TOY, 1),
        "conv bfloat16": partial(convolutions, torch.bfloat16, TOY, 2),
        "int4 float32": partial(four_bits, single, TOY, (32,)), f"tile {_text(TOY)}": partial(one_tile, TOY, 4),
        "views": views, "layouts": layouts,
    }  # fmt: skip


def _text(tile: Tile) -> str:
    return "x".join(map(str, tile[:3])) + f" warps {tile.warps} stages {tile.stages}"


# --- kernels --------------------------------------------------------------------------------------------------------


def codes(dtype: torch.dtype, count: int | None = None, *, place: Place) -> None:
    """`quantize_matrix` and `quantize_image`; count: how many of the shapes."""
    for m, k in ((3, 17), (1, 1), (37, 130), (513, 2049), (8, 5120))[:count]:
        for grid in (place.grid(k), place.grid(None, 0), place.grid(None, 255)):
            x = place.normal(m, k, dtype=dtype) * 3
            q = launch.quantize_matrix(x, grid, launch.round_up(k))
            place.judge.static_codes(f"matrix, {m} x {k}", q, x.double(), grid)
    for (b, c, h, w), pad in (((2, 24, 5, 7), 1), ((1, 3, 9, 9), 0), ((3, 130, 6, 5), 2), ((2, 320, 33, 31), 1))[
        :count
    ]:
        for last in (False, True):
            x, grid = place.image(b, c, h, w, dtype, last), place.grid(c)
            q = launch.quantize_image(x, grid, launch.round_up(c), (pad, pad))
            what = f"image, {b} x {c} x {h} x {w} border {pad}{' channels last' if last else ''}"
            place.judge.static_codes(what, q, x.permute(0, 2, 3, 1).double(), grid, pad=pad)


def rows(dtype: torch.dtype, lengths: tuple[int, ...] = (1, 70, 640, 4097, 9000), *, place: Place) -> None:
    """`quantize_rows`, of rows that are longer than a program holds and of constant ones too."""
    for k in lengths:
        x = place.normal(7, k, dtype=dtype) * 3
        x[1], x[2] = 0.25, 0.0
        for bits in (8, 4):
            for grid in (place.grid(k), place.grid()):
                balance = grid.inverse_balance
                value = x.double() if balance is None else x.double() * balance.double()
                found = launch.quantize_rows(x, balance, bits, launch.round_up(k))
                place.judge.rows(f"rows, 7 x {k} in {bits} bits", found, value, bits)


def norms(dtype: torch.dtype, count: int | None = None, *, place: Place) -> None:
    """GroupNorm and SiLU with static quantization."""
    for shape, groups in (
        ((2, 32, 4, 4), 8), ((1, 30, 3, 5), 3), ((9, 8, 1, 1), 2), ((1, 96, 20, 20), 32), ((2, 320, 64, 64), 32),
    )[:count]:  # fmt: skip
        c = shape[1]
        for last in (False, True):
            # A mean far from zero: no square of it may be subtracted.
            x = place.image(*shape, dtype, last) * 0.7 + 30
            weight, bias = place.normal(c, dtype=dtype), place.normal(c, dtype=dtype)
            grid = place.grid(c, 30)
            for silu in (False, True):
                affine = launch.group_norm(x, groups, weight, bias, 1e-5)
                q = launch.quantize_image(x, grid, launch.round_up(c), (1, 1), affine, silu)
                if place.judge.silent:
                    continue
                value = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
                value = F.silu(value) if silu else value
                what = f"group norm, {shape} in {groups} groups"
                place.judge.static_codes(what, q, value.permute(0, 2, 3, 1), grid, NORM_SLACK, pad=1)


LINEARS = ((5, 24, 13), (130, 320, 200), (37, 130, 70), (1, 16, 1), (154, 768, 320), (513, 1280, 72))


def linears(dtype: torch.dtype, tile: Tile, count: int | None = None, *, place: Place) -> None:
    """Linear layers with static and per-token activations, with and without bias, split and not."""
    for m, k, n in LINEARS[:count]:
        layer = place.layer(Geometry((n, k)))
        x, bias = (place.normal(*size, dtype=dtype) for size in ((m, k), (n,)))
        for split in (1, 4):
            with forced(tile._replace(split=split)):
                what = f"{m} x {k} x {n} split {split}"
                place.check_linear(f"static {what}", layer, x, place.grid(k), bias)
                if split == 1:
                    place.check_linear(f"plain {what}", layer, x, place.grid(), None)
                    place.check_linear(f"per token {what}", layer, x, place.grid(k), bias, dynamic=True)
    if count is None:
        place.check_linear("per token in 4 bits", layer, x, place.grid(), None, dynamic=True, bits=4)


CONVOLUTIONS = (
    (Geometry((13, 24, 3, 3), padding=(1, 1)), (2, 24, 5, 7)),
    (Geometry((13, 24, 1, 1)), (2, 24, 3, 5)),
    (Geometry((37, 21, 3, 3), (2, 2), (1, 1)), (3, 21, 9, 7)),
    (Geometry((9, 40, 3, 2), (1, 2), (2, 1), (2, 1)), (1, 40, 8, 9)),
    (Geometry((70, 320, 3, 3), padding=(1, 1)), (2, 320, 16, 16)),
    (Geometry((64, 128, 1, 1), (2, 2)), (2, 128, 9, 9)),
)


def convolutions(dtype: torch.dtype, tile: Tile, count: int | None = None, *, place: Place) -> None:
    """Any kernel, stride, padding and dilation; behind a norm."""
    for geometry, shape in CONVOLUTIONS[:count]:
        n, c = geometry.shape[:2]
        layer = place.layer(geometry)
        x, bias = place.image(*shape, dtype, last=True), place.normal(n, dtype=dtype)
        for split in (1, 4):
            with forced(tile._replace(split=split)):
                what = f"{geometry.shape} split {split}"
                place.check_conv(what, layer, x, place.grid(c), bias)
                if split > 1:
                    place.check_conv(f"plain {what}", layer, x, place.grid(), None)
    _normed(dtype, tile, place)


def _normed(dtype: torch.dtype, tile: Tile, place: Place) -> None:
    geometry = Geometry((5, 24, 3, 3), (2, 2), (1, 1))
    layer, grid, bias = place.layer(geometry), place.grid(24, 30), place.normal(5, dtype=dtype)
    x = place.image(2, 24, 5, 7, dtype) * 0.7 + 30
    norm = Norm(3, place.normal(24, dtype=dtype), place.normal(24, dtype=dtype), 1e-5)
    with forced(tile):
        y = triton_backend.conv2d_static_normed(x, layer.weight, grid, bias, norm)
        q = launch.quantize_image(x, grid, layer.weight.channels, (1, 1), launch.group_norm(x, *norm), True)
    if not place.judge.silent:
        size = (2, *geometry.output_size(5, 7))
        acc, sums = product_sums(q, layer.columns, geometry, size), layer.columns.double().sum(1)
        flat = y.permute(0, 2, 3, 1).reshape(-1, 5)
        place.judge.product("result, behind a norm", flat, acc, sums, layer.weight.scale, grid, None, bias)


def four_bits(dtype: torch.dtype, tile: Tile, groups: tuple[int, ...] = (16, 32, 64, 128), *, place: Place) -> None:
    """Packed weights in every size of their groups."""
    for group in groups:
        for geometry in (Geometry((37, 3 * group)), Geometry((70, 2 * group, 3, 3), padding=(1, 1))):
            n, c = geometry.shape[:2]
            layer, bias = place.layer(geometry, group), place.normal(n, dtype=dtype)
            with forced(tile):
                what = f"groups of {group}"
                if geometry.is_conv:
                    place.check_conv(what, layer, place.image(1, c, 5, 3, dtype), place.grid(c), bias)
                else:
                    x = place.normal(41, c, dtype=dtype) * 3
                    place.check_linear(what, layer, x, place.grid(c), bias)
                    if group == 32:
                        place.check_linear(f"per token {what}", layer, x, place.grid(c), bias, dynamic=True)


def one_tile(tile: Tile, less: int = 1, *, place: Place) -> None:
    """The sums themselves, exact in float32, over edges in every direction: all scales are 1. less: divides sizes."""
    for geometry, group, split in (
        (Geometry((200 // less, 272)), 0, 1), (Geometry((200 // less, 288)), 32, 1),
        (Geometry((136 // less, 128, 3, 3), padding=(1, 1)), 0, 1), (Geometry((136 // less, 128)), 0, 2),
    ):  # fmt: skip
        n, c = geometry.shape[:2]
        layer, grid = place.layer(geometry, group, unit=True), place.grid(None, 99, 1.0)
        shape = (2, c, 13 // less, 11) if geometry.is_conv else (300 // less, c)
        x = place.integers(-99, 157, *shape).float()
        with forced(tile._replace(split=split)):
            if geometry.is_conv:
                y = triton_backend.conv2d_static(x, layer.weight, grid, None).permute(0, 2, 3, 1).reshape(-1, n)
                q = launch.quantize_image(x, grid, c, geometry.padding)
                size = (shape[0], *geometry.output_size(*shape[2:]))
            else:
                y, size = triton_backend.linear_static(x, layer.weight, grid, None), None
                q = launch.quantize_matrix(x, grid, c)
        if place.judge.silent:
            continue
        truth = product_sums(q, layer.columns, geometry, size) - (99 - 128) * layer.columns.double().sum(1)
        if float(truth.abs().max()) >= 2**24:
            raise Wrong("the case itself is: sums beyond what float32 holds")
        place.judge.equal(f"sums of {geometry.shape} in groups of {group} split {split}", y.double(), truth)


# --- addresses, strides ---------------------------------------------------------------------------------------------


def views(*, place: Place) -> None:
    """Inputs, biases and codes in places that no load of 16 bytes can use give what copies of them give."""
    geometry, dtype = Geometry((24, 48)), torch.float16
    codes_ = place.integers(-127, 128, *geometry.shape).to(torch.int8)
    scale, grid = place.scale(24), place.grid(48)
    plain, bias = (place.normal(*size, dtype=dtype) for size in ((9, 48), (24,)))
    tile = PLAIN if place.device.type == "cuda" or place.judge.silent else TOY
    with forced(tile):
        weight = triton_backend.prepare(codes_, scale, geometry)
        static = triton_backend.linear_static(plain, weight, grid, bias)
        dynamic = triton_backend.linear_dynamic(plain, weight, grid.inverse_balance, bias)
        for how, x in odd_from(plain):
            place.judge.equal(f"static, input {how}", triton_backend.linear_static(x, weight, grid, bias), static)
            y = triton_backend.linear_dynamic(x, weight, grid.inverse_balance, bias)
            place.judge.equal(f"per token, input {how}", y, dynamic)
        away = dict(odd_from(bias[None]))["one entry off 16 bytes"][0]
        place.judge.equal("bias off", triton_backend.linear_static(plain, weight, grid, away), static)
        _, codes_off = next(odd_from(codes_))
        off = triton_backend.prepare(codes_off, scale, geometry)
        place.judge.equal("codes off", triton_backend.linear_static(plain, off, grid, bias), static)


def layouts(*, place: Place) -> None:
    """NCHW, channels last and a part of a larger image give the same convolution, with and without a norm."""
    geometry, dtype = Geometry((24, 32, 3, 3), padding=(1, 1)), torch.float16
    layer, grid, bias = place.layer(geometry), place.grid(32), place.normal(24, dtype=dtype)
    larger = place.image(2, 64, 6, 9, dtype)
    part = larger[:, 7:39, 1:, :7]
    norm = Norm(4, place.normal(32, dtype=dtype), place.normal(32, dtype=dtype), 1e-5)
    tile = PLAIN if place.device.type == "cuda" or place.judge.silent else TOY
    with forced(tile):
        first: list[Tensor] = []
        for how, x in (
            ("NCHW", part.contiguous()), ("channels last", part.contiguous(memory_format=torch.channels_last)),
            ("a part", part),
        ):  # fmt: skip
            found = [
                place.check_conv(how, layer, x, grid, bias),
                triton_backend.conv2d_static_normed(x, layer.weight, grid, bias, norm),
            ]
            first = first or found
            for what, y, other in zip(("plain", "normed"), found, first, strict=True):
                place.judge.equal(f"{what} {how}", y, other)


# --- only on a GPU --------------------------------------------------------------------------------------------------


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


NAMES = ("static", "per token", "4 bits", "conv", "normed conv")


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


ROWS, WIDTH = (2**31 + 2**27) // 1280, 1280  # more than 2^31 entries


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
