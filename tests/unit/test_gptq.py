"""GPTQ's walk: the recursion of its paper, written out, on any grid and in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tfmq.formats.gptq import BLOCK, factors, places, walk


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hessian(columns: int, seed: int) -> Tensor:
    x = draw(3 * columns, columns, seed=seed) @ (draw(columns, columns, seed=seed + 1) / columns**0.5 + 0.2)
    h = x.t() @ x
    return (h / h.diagonal().mean() + 0.01 * torch.eye(columns)).double()


def grid(rows: int, columns: int, top: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    step = (torch.rand(rows, columns, generator=generator) + 0.5) * 4 / top
    zero = torch.randint(top // 2 - 1, top // 2 + 2, (rows, columns), generator=generator)
    return step.double(), zero.double()


def by_definition(w: Tensor, step: Tensor, zero: Tensor, top: int, order: Tensor, h: Tensor) -> Tensor:
    """Eq. 2 and 3 of GPTQ: after each column the inverse of H loses it, and the rest is moved by its error.
    h: in the order of the weight."""
    w, inverse, found = w.clone(), torch.linalg.inv(h), torch.zeros_like(w)
    for k in order.tolist():
        found[:, k] = (w[:, k] / step[:, k] + zero[:, k]).clamp(0, top)
        error = (w[:, k] - (found[:, k].round() - zero[:, k]) * step[:, k]) / inverse[k, k]
        w -= error.unsqueeze(1) * inverse[k]
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        inverse[k, :] = inverse[:, k] = 0
        inverse[k, k] = 1
    return found


def of_its_own(w: Tensor, step: Tensor, zero: Tensor, top: int, order: Tensor, upper: Tensor) -> Tensor:
    """The formula that both stages of rounding had for themselves, without blocks."""
    w, step, zero = (part[:, order].t().clone() for part in (w, step, zero))
    place = torch.empty_like(w)
    for k in range(len(w)):
        place[k] = (w[k] / step[k] + zero[k]).clamp(0, top)
        error = w[k] - (place[k].round() - zero[k]) * step[k]
        w[k + 1 :] -= torch.outer(upper[k, k + 1 :] / upper[k, k], error)
    out = torch.empty_like(place)
    out[order] = place
    return out.t()


@pytest.mark.parametrize("columns", [1, 2, 31, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
@pytest.mark.parametrize("top", [15, 255])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_recursion_written_out(columns: int, top: int, per_channel: bool) -> None:
    w, h = draw(5, columns, seed=columns).double(), hessian(columns, columns + 1)
    step, zero = grid(5, 1 if per_channel else columns, top, columns + 2)
    order = h.diagonal().argsort(descending=True)
    pair = factors(h[order][:, order])
    assert pair is not None
    found = places(w, step, zero, top, order, pair[1])
    step, zero = step.expand_as(w), zero.expand_as(w)
    assert torch.allclose(found, of_its_own(w, step, zero, top, order, pair[1]))
    assert torch.allclose(found, by_definition(w, step, zero, top, order, h))
    short = places(*(part.float() for part in (w, step, zero)), top, order, pair[1].float())
    assert short.dtype == torch.float32
    q = (found.round() - zero) * step - w
    nearest = ((w / step + zero).round().clamp(0, top) - zero) * step - w
    assert columns < 31 or float(((q @ h) * q).sum()) < 0.8 * float(((nearest @ h) * nearest).sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 11), st.integers(0, 2**31))
def test_each_column_is_made_once_in_order_and_comes_back_to_its_place(
    rows: int, columns: int, width: int, seed: int
) -> None:
    w = draw(rows, columns, seed=seed)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    seen: list[Tensor] = []

    def make(at: slice, all_columns: Tensor) -> None:
        assert at.stop - at.start == min(width, columns - at.start)
        seen.append(all_columns[at].clone())
        all_columns[at] *= 2
        all_columns[at.stop :] += 1

    found = walk(w, order, width, make)
    blocks = torch.arange(columns) // width
    assert torch.allclose(torch.cat(seen), w[:, order].t() + blocks.unsqueeze(1))
    assert torch.allclose(found[:, order], 2 * (w[:, order] + blocks))


def test_a_matrix_that_is_not_positive_has_no_factors() -> None:
    assert factors(torch.zeros(3, 3)) is None and factors(-torch.eye(3)) is None
    assert factors(torch.full((2, 2), float("nan"))) is None
    pair = factors(hessian(12, 0))
    assert pair is not None
    assert torch.allclose(pair[0] @ hessian(12, 0), torch.eye(12).double(), atol=1e-9)
    assert torch.allclose(pair[1].t() @ pair[1], pair[0]) and torch.equal(pair[1], pair[1].triu())
