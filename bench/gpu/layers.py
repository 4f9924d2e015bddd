"""Random layers, inputs and grids for the stages, and what a layer's launch has to give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.truth import Judge, product_sums
from tfmq.formats import int4
from tfmq.geometry import Geometry, StaticInput
from tfmq.kernels.triton import backend as triton_backend
from tfmq.kernels.triton import launch
from tfmq.kernels.triton.launch import Prepared

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Layer(NamedTuple):
    """weight: as the kernels take it; columns int8 [N, kh * kw * C'] of its codes, C' as the activations have it."""

    weight: Prepared
    columns: Tensor
    geometry: Geometry


@dataclass
class Place:
    """Where the kernels run: everything random comes from its generator."""

    device: torch.device
    judge: Judge = field(default_factory=Judge)
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator(device=self.device).manual_seed(self.seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def grid(self, channels: int | None = None, zero_point: int = 99, scale: float = 0.031) -> StaticInput:
        balance = None
        if channels is not None:
            balance = torch.rand(channels, generator=self.generator, device=self.device) + 0.5
        zero = torch.tensor([zero_point], dtype=torch.int32, device=self.device)
        return StaticInput(torch.tensor([scale], device=self.device), zero, balance)

    def scale(self, n: int) -> Tensor:
        return torch.rand(n, generator=self.generator, device=self.device) * 0.01 + 0.001

    def layer(self, geometry: Geometry, group: int = 0, unit: bool = False) -> Layer:
        """group: of 4-bit weights, or 0. unit: all scales 1, so that results are the sums."""
        n = geometry.shape[0]
        scale = torch.ones(n, device=self.device) if unit else self.scale(n)
        if not group:
            codes = self.integers(-127, 128, *geometry.shape).to(torch.int8)
            weight = triton_backend.prepare(codes, scale, geometry)
            return Layer(weight, _columns(codes, weight.channels), geometry)
        k = math.prod(geometry.shape[1:])
        codes = self.integers(0, 16, n, k).to(torch.uint8)
        zero = self.integers(0, 16, n, k // group)
        factor = torch.minimum(self.integers(1, 16, n, k // group), 127 // torch.maximum(zero, 15 - zero))
        grid = int4.Grid(scale, factor.to(torch.uint8), zero.to(torch.uint8), group)
        packed = int4.Packed(int4.pack(codes), grid, geometry.shape)
        each = factor.repeat_interleave(group, 1) * (codes.long() - zero.repeat_interleave(group, 1))
        return Layer(triton_backend.prepare_packed(packed, geometry), each.to(torch.int8), geometry)

    def image(self, b: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
        x = self.normal(b, c, h, w, dtype=dtype) * 3
        return x.contiguous(memory_format=torch.channels_last) if last else x

    def check_linear(
        self, what: str, layer: Layer, x: Tensor, grid: StaticInput, bias: Tensor | None,
        dynamic: bool = False, bits: int = 8,
    ) -> Tensor:  # fmt: skip
        """A Linear and both its halves against float64; returns its result."""
        flat = x.reshape(-1, x.shape[-1])
        value = flat.double() if grid.inverse_balance is None else flat.double() * grid.inverse_balance.double()
        if dynamic:
            rows = launch.quantize_rows(flat, grid.inverse_balance, bits, layer.weight.channels)
            self.judge.rows(f"codes, {what}", rows, value, bits)
            y = triton_backend.linear_dynamic(x, layer.weight, grid.inverse_balance, bias, bits)
            q, used = rows.codes, None
        else:
            rows, used = None, grid
            q = launch.quantize_matrix(flat, grid, layer.weight.channels)
            self.judge.static_codes(f"codes, {what}", q, flat.double(), grid)
            y = triton_backend.linear_static(x, layer.weight, grid, bias)
        n = y.shape[-1]
        if not self.judge.silent:
            acc, sums = product_sums(q, layer.columns, layer.geometry), layer.columns.double().sum(1)
            self.judge.product(f"result, {what}", y.reshape(-1, n), acc, sums, layer.weight.scale, used, rows, bias)
        return y

    def check_conv(self, what: str, layer: Layer, x: Tensor, grid: StaticInput, bias: Tensor | None) -> Tensor:
        """A convolution and both its halves against float64; returns its result."""
        g = layer.geometry
        q = launch.quantize_image(x, grid, layer.weight.channels, g.padding)
        inner = q[:, g.padding[0] : q.shape[1] - g.padding[0], g.padding[1] : q.shape[2] - g.padding[1]]
        self.judge.static_codes(f"codes, {what}", inner, x.permute(0, 2, 3, 1).double(), grid)
        y = triton_backend.conv2d_static(x, layer.weight, grid, bias)
        if not self.judge.silent:
            size = x.shape[0], *g.output_size(x.shape[2], x.shape[3])
            n = g.shape[0]
            acc, sums = product_sums(q, layer.columns, g, size), layer.columns.double().sum(1)
            flat = y.permute(0, 2, 3, 1).reshape(-1, n)
            self.judge.product(f"result, {what}", flat, acc, sums, layer.weight.scale, grid, None, bias)
        return y


def _columns(codes: Tensor, channels: int) -> Tensor:
    """int8 [N, K] or [N, C, kh, kw] -> [N, kh * kw * channels], zeros where there is no channel."""
    columns = codes.permute(0, 2, 3, 1) if codes.dim() == 4 else codes
    out = torch.zeros(*columns.shape[:-1], channels, dtype=torch.int8, device=codes.device)
    out[..., : columns.shape[-1]] = columns
    return out.reshape(codes.shape[0], -1)


def odd_from(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """x [M, K] again, in places and with strides that no load of 16 bytes can use."""
    m, k = x.shape
    room = torch.empty(m * k + 1, dtype=x.dtype, device=x.device)
    room[1:] = x.flatten()
    yield "one entry off 16 bytes", room[1:].view(m, k)
    wide = torch.empty(m, k + 3, dtype=x.dtype, device=x.device)
    wide[:, 2 : k + 2] = x
    yield "rows of an odd stride", wide[:, 2 : k + 2]
    yield "transposed", x.t().contiguous().t()
    twice = torch.empty(m, 2 * k, dtype=x.dtype, device=x.device)
    twice[:, ::2] = x
    yield "every second column", twice[:, ::2]
