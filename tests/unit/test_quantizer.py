"""Affine quantization against float64 arithmetic and brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from tfmq.formats.affine import (
    RANGE_NORM,
    affine_grid,
    channel_scale,
    dequantize_weight,
    histogram_error,
    per_channel,
    quantize_affine,
    quantize_rows,
    quantize_weight,
    search_range,
)

pytestmark = pytest.mark.rounding

values = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


def arrays(*shapes: tuple[int, ...]) -> st.SearchStrategy[Tensor]:
    return st.sampled_from(shapes).flatmap(lambda s: hnp.arrays(np.float32, s, elements=values)).map(torch.from_numpy)


@given(arrays((1, 1), (3, 5), (2, 3, 1, 1), (4, 2, 3, 3)), st.sampled_from([2, 3, 4, 8]))
def test_weights_round_to_the_nearest_code(weight: Tensor, bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    scale = channel_scale(weight, bits)
    codes = quantize_weight(weight, scale, bits)
    assert scale.shape == (weight.shape[0],) and scale.dtype == torch.float32 and bool((scale > 0).all())
    assert codes.shape == weight.shape and codes.dtype == torch.int8
    assert int(codes.abs().max()) <= top
    exact = weight.double() / per_channel(scale.double(), weight.dim())
    # nearest, up to the rounding of one float32 division
    assert float((codes.double() - exact).abs().max()) <= 0.5 + 1e-5
    peak = weight.abs().flatten(1).amax(1)
    alive = peak > 1e-30
    assert torch.equal(codes.flatten(1).abs().amax(1)[alive], torch.full((int(alive.sum()),), top, dtype=torch.int8))
    back = dequantize_weight(codes, scale)
    assert bool(((back - weight).abs().flatten(1).amax(1) <= scale * 0.50001).all())


def test_a_dead_channel_has_zero_codes_and_a_finite_scale() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    scale = channel_scale(weight)
    assert bool(torch.isfinite(scale.reciprocal()).all())
    assert quantize_weight(weight, scale).tolist() == [[0, 0], [64, -127]]
    assert dequantize_weight(torch.tensor([[127]], dtype=torch.int8), torch.tensor([0.5]), torch.bfloat16).dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weight_codes_are_a_fixed_point(dtype: torch.dtype) -> None:
    """What was quantized once is quantized to the same codes again."""
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = channel_scale(weight)
    codes = quantize_weight(weight, scale)
    again = dequantize_weight(codes, scale)
    assert torch.equal(quantize_weight(again, channel_scale(again)), codes)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=8), st.sampled_from([4, 8]))
def test_affine_grid_spans_the_range_and_zero(pairs: list[tuple[float, float]], bits: int) -> None:
    low = torch.tensor([min(p) for p in pairs])
    high = torch.tensor([max(p) for p in pairs])
    top = 2**bits - 1
    scale, zero_point = affine_grid(low, high, bits)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert bool((scale > 0).all()) and bool(((zero_point >= 0) & (zero_point <= top)).all())
    bottom = -zero_point.double() * scale.double()
    end = (top - zero_point.double()) * scale.double()
    slack = scale.double() * 0.501 + 1e-30
    assert bool((bottom <= low.clamp_max(0).double() + slack).all())
    assert bool((end >= high.clamp_min(0).double() - slack).all())
    assert torch.equal(zero_point[low >= 0], torch.zeros_like(zero_point[low >= 0]))
    one_sided = (high <= 0) & (low < -1e-20)
    assert torch.equal(zero_point[one_sided], torch.full_like(zero_point[one_sided], top))


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=values).map(torch.from_numpy),
    st.floats(2**-10, 100, width=32),
    st.integers(0, 255),
)
def test_affine_codes_are_nearest_and_saturate(x: Tensor, scale: float, zero_point: int) -> None:
    s, z = torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)
    q = quantize_affine(x, s, z)
    assert q.dtype == torch.uint8 and q.shape == x.shape
    exact = (x.double() / s.double() + zero_point).clamp(0, 255)
    near = (x.double() / s.double()).abs().max() * 1e-6  # float32 factor instead of a division
    assert float((q.double() - exact).abs().max()) <= 0.5 + near + 1e-9
    assert bool((quantize_affine(torch.zeros(3), s, z) == zero_point).all())


def test_affine_codes_keep_the_memory_format_and_the_input() -> None:
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    inverse = torch.rand(6) + 0.5
    s, z = torch.tensor([0.02]), torch.tensor([128], dtype=torch.int32)
    q = quantize_affine(x, s, z, per_channel(inverse, 4, 1))
    assert q.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)
    expected = (x.double() * inverse.double()[None, :, None, None] / 0.02).round() + 128
    assert float((q.double() - expected.clamp(0, 255)).abs().max()) <= 1
    assert float((q.double() != expected.clamp(0, 255)).double().mean()) < 0.01
    assert quantize_affine(torch.tensor([float("inf"), float("-inf")]), s, z).tolist() == [255, 0]


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=values).map(torch.from_numpy),
    st.booleans(),
)
def test_rows_are_quantized_on_their_own(x: Tensor, balanced: bool) -> None:
    x = torch.where(x.abs() < 1e-30, torch.zeros_like(x), x)  # no grid is finer
    before = x.clone()
    inverse = torch.linspace(0.5, 2.0, x.shape[1]) if balanced else None
    codes, scale, offset = quantize_rows(x, inverse)
    assert torch.equal(x, before)
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    assert scale.shape == offset.shape == (x.shape[0], 1) and scale.dtype == offset.dtype == torch.float32
    y = x if inverse is None else x * inverse
    back = offset.double() + scale.double() * codes.double()
    span = y.double().amax(1, keepdim=True) - y.double().amin(1, keepdim=True)
    size = y.double().abs().amax(1, keepdim=True)
    assert bool(((back - y.double()).abs() <= span / 255 * 0.501 + size * 1e-5).all())
    spread = span.flatten() > size.flatten() * 1e-3
    assert bool((codes[spread].amin(1) == -128).all()) and bool((codes[spread].amax(1) == 127).all())


def test_a_constant_row_is_exact() -> None:
    codes, scale, offset = quantize_rows(torch.tensor([[3.25, 3.25], [0.0, 0.0]]))
    torch.testing.assert_close(offset + scale * codes, torch.tensor([[3.25, 3.25], [0.0, 0.0]]), rtol=0, atol=0)


# --- range search -----------------------------------------------------------------------------------------------------

counts = hnp.arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(4, 24)), elements=st.integers(0, 50))


def centers(histogram: Tensor, low: Tensor, high: Tensor) -> Tensor:
    bins = histogram.shape[1]
    return torch.stack(
        [torch.tensor([a + (b - a) * (i + 0.5) / bins for i in range(bins)], dtype=torch.float64)
         for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    )  # fmt: skip


def cost(row: Tensor, x: Tensor, low: float, high: float, norm: float, bits: int) -> float:
    """Expected error of one clipping range, bin by bin."""
    step = (high - low) / (2**bits - 1)
    total = 0.0
    for n, v in zip(row.tolist(), x.tolist(), strict=True):
        beyond = max(low - v, v - high, 0.0)
        total += n * (beyond**norm + (step / 2) ** norm / (norm + 1))
    return total


@settings(max_examples=40)
@given(counts.map(torch.from_numpy), st.floats(-8, 2), st.floats(0.125, 8), st.sampled_from([4, 8]))
def test_search_range(histogram: Tensor, start: float, span: float, bits: int) -> None:
    rows = histogram.shape[0]
    low = torch.full((rows,), start)
    high = low + span
    width = (high - low).double() / histogram.shape[1]
    plain = search_range(histogram, low, high, "minmax", bits)
    best = search_range(histogram, low, high, "mse", bits)
    tails = search_range(histogram, low, high, "percentile", bits)
    x = centers(histogram, low, high)
    for a, b in (plain, best, tails):
        assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape == (rows,)
        assert bool((a <= 0).all()) and bool((b >= 0).all())
    for i in range(rows):
        filled = histogram[i].nonzero().flatten().tolist()
        if not filled:
            assert [float(v[i]) for pair in (plain, best, tails) for v in pair] == [0.0] * 6
            continue
        least = min(0.0, float(low[i]) + filled[0] * float(width[i]))
        most = max(0.0, float(low[i]) + (filled[-1] + 1) * float(width[i]))
        assert float(plain[0][i]) == pytest.approx(least, abs=1e-6, rel=1e-6)
        assert float(plain[1][i]) == pytest.approx(most, abs=1e-6, rel=1e-6)
        # fewer than 20000 counts: 1e-4 of the mass is no whole count, so the percentile cuts nothing
        assert float(tails[0][i]) == pytest.approx(least, abs=1e-6, rel=1e-6)
        assert float(tails[1][i]) == pytest.approx(most, abs=1e-6, rel=1e-6)
        # never worse than any common shrinking of both ends, and never beyond the data
        found = cost(histogram[i], x[i], float(best[0][i]), float(best[1][i]), RANGE_NORM, bits)
        for factor in np.linspace(1.0, 0.3, 36):
            assert found <= cost(histogram[i], x[i], least * factor, most * factor, RANGE_NORM, bits) * (1 + 1e-5)
        assert least - 1e-6 <= float(best[0][i]) <= 0 <= float(best[1][i]) <= most + 1e-6


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("shape", ["silu", "normal", "one outlier"])
def test_mse_finds_the_best_pair_of_ends(shape: str, bits: int) -> None:
    """As good as trying every pair of ends; a hard edge below (SiLU) is not cut because the tail above is."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(2))
    if shape == "silu":
        x = torch.nn.functional.silu(2 * x)
    elif shape == "one outlier":
        x[0] = 40.0
    low, high = x.min(), x.max()
    histogram = torch.histc(x, 512, float(low), float(high)).long()
    found_low, found_high = search_range(histogram[None], low[None], high[None], "mse", bits)
    position = centers(histogram[None], low[None], high[None])[0]

    def error(a: float, b: float) -> float:
        step = (b - a) / (2**bits - 1)
        beyond = (a - position).clamp_min(0) + (position - b).clamp_min(0)
        return float((histogram * (beyond**RANGE_NORM + (step / 2) ** RANGE_NORM / (RANGE_NORM + 1))).sum())

    factors = np.linspace(1.0, 0.3, 36)
    pairs = {(f, g): error(float(low) * f, float(high) * g) for f in factors for g in factors}
    assert error(float(found_low), float(found_high)) <= min(pairs.values()) * 1.001
    assert error(float(found_low), float(found_high)) < pairs[1.0, 1.0]


def test_percentile_cuts_the_tails() -> None:
    histogram = torch.zeros(2, 100, dtype=torch.int64)
    histogram[0, 40:60] = 1_000_000
    histogram[0, 0] = histogram[0, 99] = 10  # 5e-7 of the mass
    histogram[1] = 1000  # 1e-2 in every bin: nothing to cut
    low, high = torch.full((2,), -1.0), torch.full((2,), 1.0)
    a, b = search_range(histogram, low, high, "percentile")
    torch.testing.assert_close(a, torch.tensor([-0.2, -1.0]))
    torch.testing.assert_close(b, torch.tensor([0.2, 1.0]))


def test_an_unknown_method_is_an_error() -> None:
    with pytest.raises(ValueError, match="sharpest"):
        search_range(torch.ones(1, 4), torch.zeros(1), torch.ones(1), "sharpest")


@given(counts.map(torch.from_numpy), st.floats(-4, 0), st.floats(0.125, 4), st.floats(0.01, 0.2), st.integers(0, 15))
def test_histogram_error_against_a_loop(
    histogram: Tensor, low: float, high: float, scale: float, zero_point: int
) -> None:
    rows = histogram.shape[0]
    a, b = torch.full((rows,), low), torch.full((rows,), high)
    s, z = torch.full((rows,), scale), torch.full((rows,), zero_point, dtype=torch.int32)
    sums = histogram_error(histogram, a, b, s, z, 4)
    assert sums.shape == (rows, 2) and sums.dtype == torch.float64
    x = centers(histogram, a, b)
    step = float(s[0])
    for i in range(rows):
        expected = cost(histogram[i], x[i], -zero_point * step, (15 - zero_point) * step, 2.0, 4)
        assert float(sums[i, 0]) == pytest.approx(expected, rel=1e-6, abs=1e-12)
        assert float(sums[i, 1]) == pytest.approx(float((histogram[i] * x[i] ** 2).sum()), rel=1e-6, abs=1e-12)


def test_histogram_error_is_that_of_real_quantization() -> None:
    """The expected error agrees with quantizing the values that the histogram was made of."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(1)).clamp(-3.9, 3.9)
    histogram = torch.histc(x, 2048, -4.0, 4.0).long().unsqueeze(0)
    low, high = torch.tensor([-4.0]), torch.tensor([4.0])
    for reach in (1.5, 3.0):
        scale, zero_point = affine_grid(torch.tensor([-reach]), torch.tensor([reach]), 4)
        codes = ((x / scale).round() + zero_point).clamp(0, 15)
        real = ((codes - zero_point) * scale - x).double().square().sum()
        error, energy = histogram_error(histogram, low, high, scale, zero_point, 4)[0]
        assert float(energy) == pytest.approx(float(x.double().square().sum()), rel=1e-4)
        assert float(error) == pytest.approx(float(real), rel=0.06)
