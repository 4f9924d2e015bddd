"""Every kernel against float64, on shapes, views and layouts of every kind. Each check takes the place to run at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu.case import Wrong
from bench.gpu.launches import forced
from bench.gpu.layers import Place, odd_from
from bench.gpu.truth import NORM_SLACK, product_sums
from tfmq.geometry import Geometry, Norm
from tfmq.kernels.triton import backend as triton_backend
from tfmq.kernels.triton import launch
from tfmq.kernels.triton.tune import Tile

PLAIN = Tile(64, 64, 64, 1, 4, 4)
TOY = Tile(32, 32, 64, 1, 4, 2)  # in the interpreter


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
