"""Channel balancing: an identity in exact arithmetic, worth it on outliers, left alone otherwise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tfmq.formats.affine import affine_grid, channel_scale, dequantize_weight, quantize_affine, quantize_weight
from tfmq.observe.balance import choose_balance


def inputs(channels: int, outliers: dict[int, float], seed: int = 0) -> Tensor:
    x = torch.randn(512, channels, generator=torch.Generator().manual_seed(seed))
    for channel, factor in outliers.items():
        x[:, channel] *= factor
    return x


def balance(x: Tensor, weight: Tensor) -> Tensor | None:
    return choose_balance(x.amin(0)[None], x.amax(0)[None], x.square().mean(0), weight)


def output_errors(x: Tensor, weight: Tensor, s: Tensor) -> tuple[float, float]:
    """Relative output error from rounding the input alone, and from rounding the weight alone."""
    truth = F.linear(x.double(), weight.double())
    balanced, w = x / s, weight * s
    scale, zero_point = affine_grid(balanced.min()[None], balanced.max()[None])
    seen = (quantize_affine(balanced, scale, zero_point).double() - zero_point) * scale.double()
    column = channel_scale(w)
    stored = dequantize_weight(quantize_weight(w, column), column)
    errors = (F.linear(seen, w.double()), F.linear(balanced.double(), stored.double()))
    return tuple(float((e - truth).norm() / truth.norm()) for e in errors)


def test_outlier_channels_are_balanced_and_the_output_gains() -> None:
    x = inputs(64, {3: 60.0, 17: 25.0})
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)) * 0.1
    s = balance(x, weight)
    assert s is not None
    assert s.dtype == torch.float32 and s.shape == (64,) and bool((s > 0).all())
    assert float(s.log().mean()) == pytest.approx(0.0, abs=1e-5)
    assert set(s.topk(2).indices.tolist()) == {3, 17}
    plain = output_errors(x, weight, torch.ones(64))
    better = output_errors(x, weight, s)
    assert better[0] ** 2 + 16 * better[1] ** 2 < 0.7 * (plain[0] ** 2 + 16 * plain[1] ** 2)


def test_even_channels_are_left_alone() -> None:
    assert balance(inputs(64, {}), torch.randn(48, 64, generator=torch.Generator().manual_seed(1))) is None


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 9), st.floats(1, 200), st.booleans())
def test_a_balance_is_an_identity(seed: int, channels: int, out: int, factor: float, conv: bool) -> None:
    x = inputs(channels, {0: factor}, seed)
    shape = (out, channels, 3, 3) if conv else (out, channels)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    s = balance(x, weight)
    if s is None:
        return
    assert bool(torch.isfinite(s).all()) and bool((s > 0).all())
    flat = weight.flatten(2).sum(2) if conv else weight
    once = F.linear(x.double() / s.double(), flat.double() * s.double())
    torch.testing.assert_close(once, F.linear(x.double(), flat.double()))


def test_dead_channels_and_empty_intervals() -> None:
    x = inputs(16, {2: 80.0})
    x[:, 5] = 0.0
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    weight[:, 6] = 0.0
    low, high = torch.full((3, 16), float("inf")), torch.full((3, 16), float("-inf"))
    low[1], high[1] = x.amin(0), x.amax(0)
    s = choose_balance(low, high, x.square().mean(0), weight)
    assert s is not None and bool(torch.isfinite(s).all())
    assert s[5] == s[6] == 1.0
    only = choose_balance(low[1:2], high[1:2], x.square().mean(0), weight)
    assert only is not None and torch.equal(s, only)  # an interval that no call visited says nothing
    for dead_x, dead_w in ((torch.zeros_like(x), weight), (x, torch.zeros_like(weight))):
        assert balance(dead_x, dead_w) is None


def test_a_grouped_convolution_is_left_alone() -> None:
    x = inputs(16, {2: 80.0})
    for weight in (torch.randn(16, 1, 3, 3), torch.randn(8, 4, 3, 3)):
        assert balance(x, weight) is None
