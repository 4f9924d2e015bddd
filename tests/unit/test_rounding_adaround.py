"""Learned rounding alone: lower than where it started, balanced draws, and the gradient that is written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfmq.formats import int4
from tfmq.geometry import Geometry
from tfmq.rounding.adaround import Draw, Group, Settings, Starting, _Soft, adaround, loss, measure
from tfmq.rounding.layer import Layer, Rows
from tfmq.scheme import DYNAMIC, NONE, Scheme

CPU = torch.device("cpu")


def rows_of(count: int) -> Rows:
    return Rows(torch.arange(count) % 3, torch.arange(count) % 2)


def layer_and_weight(activation: str = DYNAMIC) -> tuple[Layer, Tensor, Starting]:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    layer = Layer(Scheme(4, 8, activation, group=16), Geometry((16, 32)))
    layer.grid = int4.search_grid(weight, 16)
    layer.codes = int4.nearest(weight, layer.grid)
    return layer, weight, Starting(int4.place(weight, layer.grid).clamp_(0, 15), layer.codes)


def test_lower_than_nearest() -> None:
    layer, weight, start = layer_and_weight()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(48, 20, 32, generator=generator) @ (torch.randn(32, 32, generator=generator) + 1)
    group = Group((x,), {}, [x @ weight.t()], rows_of(48))

    def call(args: Any, kwargs: Any, rows: Rows, dtype: torch.dtype) -> list[Tensor]:
        return [layer.compute(args[0], rows, dtype)]

    before = measure(call, [group], CPU, 16)
    settings = Settings(iterations=300, scale_iterations=0, batch=12, rate=3e-2)
    codes = adaround(call, {"a": layer}, {"a": start}, before, [group], settings, CPU, torch.float32, 0, lambda: None)
    assert layer.trained is None and int((codes["a"].int() - start.codes.int()).abs().max()) == 1
    layer.codes = codes["a"]
    assert measure(call, [group], CPU, 16) < 0.85 * before


def test_the_gradient_is_that_of_the_formula() -> None:
    layer, _, start = layer_and_weight(NONE)
    assert layer.grid is not None
    soft = _Soft(layer, start, CPU)
    soft.alpha.data += torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    alpha = soft.alpha.detach().clone().requires_grad_()
    h = (1.2 * torch.sigmoid(alpha) - 0.1).clamp(0, 1)
    zero = layer.grid.zero.float().repeat_interleave(16, 1)
    formula = int4.step(layer.grid) * (soft.floor + h - zero)
    target = torch.randn(16, 32, generator=torch.Generator().manual_seed(4))
    ((formula - target).square().sum() + 0.3 * (1 - (2 * h - 1).abs().pow(5.0)).sum()).backward()

    used = soft.weight()
    assert torch.allclose(used, formula, atol=1e-6)
    (used - target).square().sum().backward()
    soft.gradient(0.3, 5.0)
    assert soft.alpha.grad is not None and alpha.grad is not None
    assert torch.allclose(soft.alpha.grad, alpha.grad, atol=1e-4)


def test_draws_are_even_over_intervals_and_branches() -> None:
    # 60 samples of the first cell, 4 of each other.
    interval = torch.tensor([0] * 60 + [1] * 4 + [2] * 4)
    group = Group((), {}, [torch.zeros(68, 1)], Rows(interval, torch.zeros(68).long()))
    draw = Draw([group], seed=0)
    counts = torch.zeros(3)
    for _ in range(100):
        found, rows = draw(3)
        assert found is group
        counts += torch.bincount(interval[rows], minlength=3)
    assert counts.min() == counts.max() == 100


def test_loss_sums_over_channels() -> None:
    image, tokens = torch.ones(2, 5, 3, 3), torch.ones(2, 4, 7)
    assert float(loss([image, tokens], [torch.zeros_like(image), torch.zeros_like(tokens)])) == 12
