"""Four-bit weights: what the bytes say is what the formula says, and the searched range is a good one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmq.formats.int4 import (
    Grid,
    Packed,
    from_columns,
    group_for,
    nearest,
    pack,
    place,
    search_grid,
    step,
    to_columns,
    unpack,
    values,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 9), st.integers(0, 20), st.integers(0, 2**30))
@settings(deadline=None)
def test_packing_loses_nothing(n: int, half: int, seed: int) -> None:
    codes = torch.randint(0, 16, (n, 2 * half), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes)
    assert packed.shape == (n, half) and packed.dtype == torch.uint8
    assert packed.is_contiguous() and torch.equal(unpack(packed), codes)
    columns_first = packed.t().contiguous().t()  # the same bytes, those of a column one behind the other
    assert torch.equal(unpack(columns_first), codes)
    assert torch.equal(pack(codes.t().contiguous().t()), packed)


def test_what_does_not_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        pack(torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at most 15"):
        pack(torch.full((2, 4), 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="do not divide"):
        search_grid(random(2, 30), 16)


@pytest.mark.parametrize("shape", [(7, 64), (5, 32, 3, 3), (3, 16, 1, 1), (4, 48, 2, 5)], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_formula_holds_entry_by_entry(shape: tuple[int, ...], symmetric: bool) -> None:
    weight = random(*shape) + 0.3
    columns = to_columns(weight)
    grid = search_grid(columns, 16, symmetric=symmetric)
    codes = nearest(columns, grid)
    packed = Packed(pack(codes), grid, shape)
    n, k = columns.shape
    expected, integer = torch.empty(n, k, dtype=torch.float64), torch.empty(n, k, dtype=torch.int64)
    for i in range(n):
        for j in range(k):
            factor, zero = int(grid.factor[i, j // 16]), int(grid.zero[i, j // 16])
            integer[i, j] = factor * (int(codes[i, j]) - zero)
            expected[i, j] = float(grid.scale[i]) * int(integer[i, j])
    assert int(integer.abs().max()) <= 127
    assert torch.equal(packed.int8().long(), from_columns(integer, shape))
    torch.testing.assert_close(packed.dequantize().double(), from_columns(expected, shape), rtol=1e-6, atol=0)
    torch.testing.assert_close(values(codes, grid).double(), expected, rtol=1e-6, atol=0)
    if symmetric:
        assert bool((grid.zero == 8).all())


def test_columns_are_in_the_order_of_a_channels_last_image() -> None:
    weight = random(2, 4, 3, 5)
    columns = to_columns(weight)
    assert columns[1, (2 * 5 + 3) * 4 + 1] == weight[1, 1, 2, 3]
    assert torch.equal(from_columns(columns, (2, 4, 3, 5)), weight)


def test_nearest_takes_the_nearest_point() -> None:
    columns = random(4, 32)
    grid = search_grid(columns, 16)
    every = torch.stack([values(torch.full((4, 32), c, dtype=torch.uint8), grid) for c in range(16)])
    best = (every - columns).abs().amin(0)
    torch.testing.assert_close((values(nearest(columns, grid), grid) - columns).abs(), best, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((place(columns, grid) - grid.zero.repeat_interleave(16, 1)) * step(grid), columns)


def test_the_search_beats_the_whole_range_and_one_factor() -> None:
    columns = random(32, 256) * (
        1 + 3 * torch.rand(32, 8, generator=torch.Generator().manual_seed(5))
    ).repeat_interleave(32, 1)

    def error(grid: Grid) -> float:
        return float((values(nearest(columns, grid), grid) - columns).square().sum())

    grouped = columns.view(32, -1, 32)
    low, high = grouped.amin(2), grouped.amax(2)
    size = (high - low) / 15
    scale = (size / 8).amax(1)
    factor = (size / scale.unsqueeze(1)).ceil().clamp(1, 8)
    whole = Grid(scale, factor.to(torch.uint8), (-low / (scale.unsqueeze(1) * factor)).round().to(torch.uint8), 32)
    searched = search_grid(columns, 32)
    assert error(searched) < 0.9 * error(whole)
    assert error(search_grid(columns, 256)) > 1.2 * error(searched)


def test_important_columns_are_kept_better() -> None:
    columns = random(16, 128)
    importance = torch.ones(128)
    importance[::16] = 1000.0
    errors = []
    for given_importance in (None, importance):
        grid = search_grid(columns, 32, given_importance)
        errors.append((values(nearest(columns, grid), grid) - columns).square()[:, ::16].sum())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("weight", [torch.zeros(3, 32), torch.full((3, 32), 0.7), torch.full((3, 32), -2e-20)], ids=str)
def test_constant_weights(weight: torch.Tensor) -> None:
    grid = search_grid(weight, 32)
    assert bool(torch.isfinite(grid.scale).all()) and bool((grid.factor >= 1).all())
    torch.testing.assert_close(values(nearest(weight, grid), grid), weight, rtol=0.05, atol=1e-19)


@pytest.mark.parametrize(
    ("channels", "wanted", "group"),
    [(320, 64, 64), (320, 128, 64), (96, 128, 32), (48, 32, 16), (40, 32, 0), (4, 64, 0)],
)
def test_group_for(channels: int, wanted: int, group: int) -> None:
    assert group_for(channels, wanted) == group
