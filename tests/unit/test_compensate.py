"""8-bit rounding that makes up for its own error on a sample of the input."""

import pytest
import torch
from torch import Tensor

from tfmq.formats.affine import channel_scale, dequantize_weight, quantize_weight
from tfmq.solve.gptq8 import AT_ONCE, DAMPING, GROUP, compensated


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def alike(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows that lie near a few directions, as real inputs do, off their mean."""
    return draw(rows, 6, seed=seed + 1) @ draw(6, columns, seed=99) + 0.1 * draw(rows, columns, seed=seed) + 0.5


def by_definition(weight: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """Each group of columns from the minimum over all columns that are left, solved anew every time, in float64."""
    x = rows.double() / rows.double().square().sum(0).mean().sqrt()
    order = x.square().sum(0).argsort(descending=True)
    x, w = x[:, order], (weight.double() / scale.double().unsqueeze(1))[:, order]
    codes = torch.zeros_like(w)
    for k in range(0, w.shape[1], GROUP):
        group = slice(k, k + GROUP)
        u = (codes[:, :k] - w[:, :k]) @ x[:, :k].t()
        free = x[:, k:]
        hessian = free.t() @ free + DAMPING * torch.eye(free.shape[1], dtype=x.dtype)
        moved = -torch.linalg.solve(hessian, free.t() @ u.t())[:GROUP].t()
        codes[:, group] = (w[:, group] + moved).round().clamp(-127, 127)
    out = torch.empty_like(codes)
    out[:, order] = codes
    return out.to(torch.int8)


@pytest.mark.parametrize("columns", [GROUP - 1, 4 * GROUP, 4 * GROUP + 1, 8 * GROUP + 5])
@pytest.mark.parametrize("rows", [1, 12, 90])
def test_every_column_makes_up_for_those_before_it(columns: int, rows: int) -> None:
    weight, x = draw(9, columns), alike(rows, columns)
    scale = channel_scale(weight)
    got, expected = compensated(weight, scale, x), by_definition(weight, scale, x)
    # An entry half-way between two codes may fall to either side, and what follows with it.
    assert float((got != expected).float().mean()) < 0.02
    error = [float((x @ (dequantize_weight(c, scale) - weight).t()).square().sum()) for c in (got, expected)]
    assert error[0] == pytest.approx(error[1], rel=0.05)


def test_more_groups_than_are_solved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = draw(9, 11 * GROUP + 3), alike(12, 11 * GROUP + 3)
    scale = channel_scale(weight)
    whole = compensated(weight, scale, x)
    assert AT_ONCE > 12
    monkeypatch.setattr("tfmq.solve.gptq8.AT_ONCE", 5)
    assert torch.equal(whole, compensated(weight, scale, x))


@pytest.mark.parametrize("shape", [(24, 96), (24, 12, 3, 3)], ids=str)
def test_less_error_on_inputs_that_were_not_in_the_sample(shape: tuple[int, ...]) -> None:
    weight = draw(*shape)
    flat, scale = weight.flatten(1), channel_scale(weight)
    sample, others = alike(64, flat.shape[1]), alike(500, flat.shape[1], seed=7)
    codes = compensated(weight, scale, sample)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape and int(codes.abs().max()) <= 127

    def error(codes: Tensor) -> float:
        return float((others @ (dequantize_weight(codes, scale) - weight).flatten(1).t()).square().mean())

    assert error(codes) < 0.2 * error(quantize_weight(weight, scale))
    assert flat.equal(weight.flatten(1))


def test_columns_that_have_nothing_in_common_are_rounded_to_the_nearest() -> None:
    weight = draw(5, 16)
    scale = channel_scale(weight)
    for rows in (torch.eye(16) * 3, torch.zeros(4, 16)):
        assert torch.equal(compensated(weight, scale, rows), quantize_weight(weight, scale))


def test_channels_that_were_never_on_are_left_alone() -> None:
    weight, rows = draw(5, 40), alike(20, 40)
    rows[:, 3::7] = 0
    scale = channel_scale(weight)
    codes, nearest = compensated(weight, scale, rows), quantize_weight(weight, scale)
    assert torch.equal(codes[:, 3::7], nearest[:, 3::7]) and not torch.equal(codes, nearest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_scale_of_the_sample_and_its_type_do_not_matter(dtype: torch.dtype) -> None:
    weight, rows = draw(5, 40), alike(20, 40).to(dtype)
    scale = channel_scale(weight)
    assert torch.equal(compensated(weight, scale, rows), compensated(weight, scale, rows.float() * 2.0**-20))
