"""From plan and statistics to integers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tfmq.decide.grids import static_grid
from tfmq.formats.affine import dequantize_weight, per_channel
from tfmq.formats.hadamard import unrotate
from tfmq.formats.int4 import Grid, values
from tfmq.observe.statistics import LayerStatistics
from tfmq.scheme import DYNAMIC, STATIC, Scheme
from tfmq.solve.layer import size_of, solve_layer
from tfmq.state import Rounded

SHAPES = [(5, 7), (6, 4, 3, 3), (3, 1, 1, 1)]


def statistics(weight: Tensor, balance: Tensor | None = None, intervals: int = 4) -> LayerStatistics:
    g = torch.Generator().manual_seed(0)
    return LayerStatistics(
        kind="conv2d" if weight.dim() == 4 else "linear", shape=tuple(weight.shape), order=0,
        low=torch.full((intervals,), -2.0), high=torch.full((intervals,), 6.0), balance=balance,
        histogram=torch.randint(1, 100, (intervals, 64), generator=g), bin_low=torch.full((intervals,), -2.5),
        bin_high=torch.full((intervals,), 6.5), row_error=torch.ones(intervals, 2, dtype=torch.float64),
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("balanced", [False, True])
def test_codes_scale_and_balance_make_the_weight(shape: tuple[int, ...], dtype: torch.dtype, balanced: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    vector = torch.rand(shape[1], generator=torch.Generator().manual_seed(2)) + 0.5
    before = weight.clone()
    scheme = Scheme(balanced=balanced)
    state = solve_layer(scheme, statistics(weight, vector), weight, "mse")
    assert torch.equal(weight, before)
    assert state.codes.dtype == torch.int8 and state.codes.shape == shape
    assert int(state.codes.abs().max()) == 127
    assert state.scale.dtype == torch.float32 and state.scale.shape == (shape[0],)
    assert (state.balance is not None) == balanced
    s = per_channel(vector.double(), len(shape), 1) if balanced else 1.0
    step = per_channel(state.scale.double(), len(shape))
    assert bool(((state.codes.double() * step - weight.double() * s).abs() <= step * 0.50001).all())


@pytest.mark.parametrize("shape", [(5, 64), (6, 32, 3, 3)], ids=str)
@pytest.mark.parametrize("balanced", [False, True])
def test_four_bits_are_packed_and_near(shape: tuple[int, ...], balanced: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    vector = torch.rand(shape[1], generator=torch.Generator().manual_seed(2)) + 0.5
    scheme = Scheme(weight_bits=4, group=32, balanced=balanced)
    state = solve_layer(scheme, statistics(weight, vector), weight, "mse")
    assert state.codes.dtype == torch.uint8 and state.codes.numel() == weight.numel() // 2
    assert state.shape == shape and state.packed is not None
    s = per_channel(vector, len(shape), 1) if balanced else 1.0
    assert float((state.packed.dequantize() - weight * s).norm() / (weight * s).norm()) < 0.1


def test_codes_found_elsewhere_are_taken() -> None:
    weight = torch.randn(5, 64)
    found = Grid(torch.rand(5), torch.full((5, 2), 3, dtype=torch.uint8), torch.full((5, 2), 7, dtype=torch.uint8), 32)
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    table = torch.rand(4), torch.arange(4, dtype=torch.int32)
    state = solve_layer(
        Scheme(weight_bits=4, group=32), statistics(weight), weight, "mse", rounded=Rounded(codes, *found, *table)
    )
    assert state.packed is not None and torch.equal(state.packed.dequantize(), values(codes, found))
    assert state.act_scale is table[0] and state.act_zero_point is table[1]


def test_eight_bits_found_elsewhere_are_taken() -> None:
    weight = torch.randn(5, 4, 3, 3)
    found = Rounded(torch.randint(-127, 128, weight.shape, dtype=torch.int8), torch.rand(5))
    state = solve_layer(Scheme(), statistics(weight), weight, "mse", rounded=found)
    assert state.codes is found.codes and state.scale is found.scale and state.packed is None
    own = solve_layer(Scheme(), statistics(weight), weight, "mse")
    assert own.act_scale is not None and state.act_scale is not None and torch.equal(own.act_scale, state.act_scale)


def test_activation_tables() -> None:
    weight = torch.randn(5, 7)
    found = statistics(weight)
    static = solve_layer(Scheme(activation=STATIC), found, weight, "mse")
    scale, zero_point = static_grid(found, "mse")
    assert static.act_scale is not None and static.act_zero_point is not None
    assert torch.equal(static.act_scale, scale) and torch.equal(static.act_zero_point, zero_point)
    assert static.act_scale.dtype == torch.float32 and static.act_zero_point.dtype == torch.int32
    assert static.act_scale.shape == (4,)
    wide = solve_layer(Scheme(activation=STATIC), found, weight, "minmax")
    assert wide.act_scale is not None and bool((wide.act_scale >= scale).all())
    dynamic = solve_layer(Scheme(activation=DYNAMIC), found, weight, "mse")
    assert dynamic.act_scale is None and dynamic.act_zero_point is None
    assert torch.equal(dynamic.codes, static.codes)


def test_bytes() -> None:
    weight = torch.randn(5, 7)
    found = statistics(weight, torch.ones(7))
    assert solve_layer(Scheme(activation=DYNAMIC), found, weight, "mse").nbytes == 35 + 20
    assert solve_layer(Scheme(balanced=True), found, weight, "mse").nbytes == 35 + 20 + 28 + 16 + 16


@pytest.mark.parametrize("shape", [(6, 64), (6, 64, 3, 3)], ids=str)
@pytest.mark.parametrize("activation", [STATIC, DYNAMIC])
@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("changed", [False, True])
def test_bytes_are_known_beforehand(shape: tuple[int, ...], activation: str, group: int, changed: bool) -> None:
    weight = torch.randn(shape)
    found = statistics(weight, torch.ones(64))
    scheme = Scheme(4 if group else 8, 8, activation, balanced=changed, group=group)
    if changed and activation == STATIC:
        found = replace(found, branches=torch.stack([found.histogram, found.histogram]))
        scheme = replace(scheme, branches=2)
    if changed and len(shape) == 2:
        found = replace(found, permutations=torch.arange(64, dtype=torch.int16).unsqueeze(0))
        scheme = replace(scheme, rotation=32, permuted=True)
    assert size_of(scheme, found) == solve_layer(scheme, found, weight, "mse").nbytes


def test_a_scheme_without_balance_ignores_the_vector() -> None:
    weight = torch.randn(5, 7)
    with_vector = solve_layer(Scheme(), statistics(weight, torch.rand(7) + 0.5), weight, "mse")
    assert with_vector.balance is None
    assert torch.equal(with_vector.codes, solve_layer(Scheme(), statistics(weight), weight, "mse").codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_weight_is_an_error(bad: float) -> None:
    weight = torch.randn(5, 7)
    weight[2, 3] = bad
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        solve_layer(Scheme(), statistics(weight), weight, "mse")


def test_no_gradient_is_kept() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 7))
    state = solve_layer(Scheme(), statistics(weight), weight, "mse")
    assert not any(t.requires_grad for t in (state.codes, state.scale, state.act_scale) if t is not None)
    assert torch.all(solve_layer(Scheme(), statistics(weight), torch.zeros(5, 7), "mse").codes == 0)


@pytest.mark.parametrize("shape", [(20, 64), (20, 16, 3, 3)], ids=str)
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("rotation", [0, 16])
def test_eight_bits_make_up_for_their_error_on_the_sample(
    shape: tuple[int, ...], balanced: bool, rotation: int
) -> None:
    g = torch.Generator().manual_seed(3)
    weight, vector = torch.randn(shape, generator=g), torch.rand(shape[1], generator=g) * 4 + 0.2
    rows = torch.randn(64, 5, generator=g) @ torch.randn(5, weight[0].numel(), generator=g)
    rotation *= weight.dim() == 2
    scheme = Scheme(activation=DYNAMIC, balanced=balanced, rotation=rotation)
    plain = statistics(weight, vector)

    def error(found: LayerStatistics) -> float:
        state = solve_layer(scheme, found, weight, "mse")
        made = unrotate(dequantize_weight(state.codes, state.scale), rotation)
        made = made if state.balance is None else made / per_channel(state.balance, weight.dim(), 1)
        return float(((made - weight).flatten(1) @ rows.t()).square().mean())

    assert error(replace(plain, rows=rows.bfloat16())) < 0.1 * error(plain)
