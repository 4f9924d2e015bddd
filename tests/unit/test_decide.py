"""Recipe and statistics to plan: the rule, the reasons, the grids."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tfmq.decide.candidates import dynamic_error, static_error
from tfmq.decide.grids import static_grid
from tfmq.decide.plan import decide
from tfmq.errors import TfmqError
from tfmq.formats.affine import affine_grid, histogram_error, search_range
from tfmq.formats.hadamard import group_of
from tfmq.kernels.costs import NARROW, Costs
from tfmq.kernels.table import BACKENDS
from tfmq.observe.calibration import Calibration
from tfmq.observe.statistics import LayerStatistics
from tfmq.scheme import DYNAMIC, NONE, PRESETS, STATIC, Recipe, Scheme
from tfmq.timeline import Partition, TimeAxis


def statistics(
    kind: str = "linear", intervals: int = 4, per_token: float = 1e-6, *, vector: bool = False,
    balance: Tensor | None = None, visited: list[int] | None = None, seed: int = 0, channels: int = 3,
) -> LayerStatistics:  # fmt: skip
    """A bell over 128 bins, another width in every interval. per_token: squared error of an energy of 1."""
    x = torch.randn(intervals, 5000, generator=torch.Generator().manual_seed(seed)).clamp(-3.9, 3.9)
    x = x * torch.linspace(0.5, 2.0, intervals).unsqueeze(1)
    low, high = x.amin(1) - 0.5, x.amax(1) + 0.5
    rows = [torch.histc(row, 128, float(a), float(b)) for row, a, b in zip(x, low, high, strict=True)]
    histogram = torch.stack(rows).long()
    seen_low, seen_high = x.amin(1), x.amax(1)
    if visited is not None:
        absent = torch.tensor([i not in visited for i in range(intervals)])
        histogram[absent] = 0
        seen_low, seen_high = (
            seen_low.masked_fill(absent, float("inf")), seen_high.masked_fill(absent, float("-inf"))
        )  # fmt: skip
    row_error = torch.tensor([[per_token, 1.0]], dtype=torch.float64).repeat(intervals, 1)
    shape = (4, channels, 3, 3) if kind == "conv2d" else (4, channels)
    return LayerStatistics(
        kind=kind, shape=shape, order=0, low=seen_low, high=seen_high, balance=balance, histogram=histogram,
        bin_low=low, bin_high=high, row_error=row_error, vector=vector,
    )  # fmt: skip


def calibration(layers: dict[str, LayerStatistics]) -> Calibration:
    return Calibration("model", "EPS", TimeAxis(0, 999), Partition.uniform(4), layers, {})


# --- grids ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_unvisited_intervals_are_interpolated(case: tuple[int, set[int]]) -> None:
    intervals, visited = case
    known = sorted(visited)
    found = statistics(intervals=intervals, visited=known)
    low, high = search_range(found.histogram, found.bin_low, found.bin_high, "mse")
    low, high = torch.maximum(low, found.low), torch.minimum(high, found.high)
    expected = [torch.from_numpy(np.interp(range(intervals), known, v[known].double().numpy())) for v in (low, high)]
    scale, zero_point = static_grid(found, "mse")
    want_scale, want_zero = affine_grid(expected[0].float(), expected[1].float())
    torch.testing.assert_close(scale, want_scale)
    assert int((zero_point - want_zero).abs().max()) <= 1
    assert bool((scale > 1e-4).all())  # none fell back to an empty range


def test_a_grid_never_reaches_beyond_the_data() -> None:
    found = statistics()
    scale, zero_point = static_grid(found, "minmax")
    bottom, top = -zero_point * scale, (255 - zero_point) * scale
    assert bool((bottom >= found.low - scale).all()) and bool((top <= found.high + scale).all())
    assert bool((bottom <= found.low + scale).all()) and bool((top >= found.high - scale).all())


def test_the_errors() -> None:
    found = statistics(per_token=0.04)
    scale, zero_point = static_grid(found, "mse")
    sums = histogram_error(found.histogram, found.bin_low, found.bin_high, scale, zero_point).sum(0)
    assert static_error(found, "mse") == pytest.approx(float(sums[0] / sums[1]) ** 0.5)
    assert static_error(found, "mse", 4) > 4 * static_error(found, "mse", 8)
    assert dynamic_error(found) == pytest.approx(0.2)
    # one part in 255 of the range: the figure is what uniform rounding makes of it, up to clipping
    assert 0.5 * float(scale[-1]) / 12**0.5 / 2.0 < static_error(found, "minmax") < 0.05


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_a_range_per_token_costs_nothing_beside_convolutions_in_float() -> None:
    static = static_error(statistics(), "mse")
    found = {"a": statistics(per_token=static**2 / 1.5)}
    for recipe, expected in (("W8A8", STATIC), ("W8A8 Linear only", DYNAMIC)):
        plan = decide(PRESETS[recipe], calibration(found), {"a": "linear"}, {}, Costs(2.0))
        assert plan.layers["a"].activation == expected


@pytest.mark.parametrize(
    "convolutions, ratio, dynamic_cost, rotation_cost, rotated",
    [
        (True, 0.45, 1.0, 0.0, True),
        (True, 0.7, 1.0, 0.0, False),  # lost beside the error of integer convolutions
        (True, 0.45, 1.0, 0.3, False),  # 0.45 * 1.3
        (True, 0.45, 3.0, 0.3, True),  # 0.45 * 1.1
        (False, 0.7, 1.0, 0.3, True),  # time is not counted
        (False, 0.9, 1.0, 0.0, False),
    ],
)
def test_a_rotation_must_be_worth_its_time(
    convolutions: bool, ratio: float, dynamic_cost: float, rotation_cost: float, rotated: bool
) -> None:
    recipe = Recipe("r", activations=DYNAMIC, convolutions=convolutions)
    found = statistics(channels=32)
    found = replace(found, rotated=replace(found, row_error=found.row_error * torch.tensor([ratio, 1.0])))
    costs = Costs(dynamic_cost, rotation_cost)
    scheme = decide(recipe, calibration({"a": found}), {"a": "linear"}, {}, costs).layers["a"]
    assert scheme.rotation == (32 if rotated else 0)


CARDS = {  # GB/s, float16 TFLOPS with float32 sums, int8 TOPS: data sheets
    "RTX 3090": (936, 71, 284), "RTX 5090": (1792, 209.5, 838), "A100": (1555, 312, 624), "H100": (3350, 989, 1979),
}  # fmt: skip


@pytest.mark.parametrize("card", CARDS)
def test_what_a_rotation_costs_on_a_gpu(card: str) -> None:
    """By the shape of the layer, and much the same on all cards."""
    costs = next(b.costs for b in BACKENDS if b.name == "triton")
    memory, float16, int8 = CARDS[card]
    there = replace(costs, float16=1e3 * float16 / memory, int8=1e3 * int8 / memory)
    for n, k in ((320, 320), (2560, 320), (320, 1280), (640, 640), (5120, 640), (1280, 5120), (10240, 1280)):
        shape, group = (n, k), group_of(k)
        one = costs.of_rotation(shape, group)
        assert 0.05 < one < 1.5 and one > costs.of_rotation((2 * n, k), group)
        assert 0.5 < there.of_rotation(shape, group) / one < 1.5
        assert costs.of_rotation(shape, group, 1) > one and costs.of_rotation(shape, group, balanced=True) > one
        assert costs.of_rotation(shape, group, 2) > 2 * one


@pytest.mark.parametrize(("outputs", "rotated"), [(64, False), (4096, True)])
def test_a_gpu_rotates_what_has_many_outputs(outputs: int, rotated: bool) -> None:
    """Beside a product that takes long the rotation is cheap."""
    costs = next(b.costs for b in BACKENDS if b.name == "triton")
    found = replace(statistics(channels=32), shape=(outputs, 32))
    found = replace(found, rotated=replace(found, row_error=found.row_error * torch.tensor([0.45, 1.0])))
    recipe = Recipe("r", activations=DYNAMIC)
    scheme = decide(recipe, calibration({"a": found}), {"a": "linear"}, {}, costs).layers["a"]
    assert scheme.rotation == (32 if rotated else 0)


@pytest.mark.parametrize("bits, rotated", [(8, True), (4, False)])
def test_an_error_of_the_weight_that_feedback_takes_back_stops_no_rotation(bits: int, rotated: bool) -> None:
    found = statistics(channels=32, per_token=1e-4)
    errors = torch.tensor([[1e-5, 1e-5], [2e-5, 2e-5]], dtype=torch.float64)  # of nearest rounding, plain and rotated
    better = replace(found, row_error=found.row_error * torch.tensor([0.0, 1.0]))
    recipe = Recipe("r", weight_bits=bits, activations=DYNAMIC)
    for scale, expected in ((1.0, rotated), (1e3, False)):
        seen = replace(found, rotated=better, weight_error=errors * scale)
        scheme = decide(recipe, calibration({"a": seen}), {"a": "linear"}, {}).layers["a"]
        assert scheme.rotation == (32 if expected else 0)


@pytest.mark.parametrize("cost", [1.0, 1.3])
def test_static_is_chosen_up_to_the_cost_of_dynamic(cost: float) -> None:
    static = static_error(statistics(), "mse")
    for share, expected in ((0.999, DYNAMIC), (1.001, STATIC)):
        # error(static)^2 <= error(dynamic)^2 * cost turns at error(dynamic)^2 = static^2 / cost
        found = statistics(per_token=static**2 / cost * share**2)
        plan = decide(PRESETS["W8A8"], calibration({"a": found}), {"a": "linear"}, {}, Costs(cost))
        assert plan.layers["a"].activation == expected
        assert f"{static:.2e}" in plan.reasons["a"] and f"{cost:.2f}" in plan.reasons["a"]


def test_the_ranges_of_the_recipe_count() -> None:
    """An input whose outermost entry spoils minmax but not mse."""
    found = statistics()
    found.histogram[:, 0] = 1
    mse, minmax = static_error(found, "mse"), static_error(found, "minmax")
    assert mse <= minmax
    for ranges, error in (("mse", mse), ("minmax", minmax)):
        plan = decide(Recipe("r", ranges=ranges), calibration({"a": found}), {"a": "linear"}, {})
        assert f"static {error:.2e}" in plan.reasons["a"]


@pytest.mark.parametrize("activations", [STATIC, DYNAMIC])
def test_what_is_asked_for_is_done(activations: str) -> None:
    layers = {"good": statistics(per_token=1e-12), "bad": statistics(per_token=1.0), "conv": statistics("conv2d")}
    kinds = {path: s.kind for path, s in layers.items()}
    plan = decide(Recipe("r", activations=activations), calibration(layers), kinds, {})
    assert plan.layers["good"].activation == plan.layers["bad"].activation == activations
    assert plan.layers["conv"].activation == STATIC  # no per-token scale exists for overlapping patches
    assert plan.reasons == {"good": "asked for", "bad": "asked for", "conv": "convolution"}


def test_bits_and_balance_enter_the_scheme() -> None:
    layers = {"plain": statistics(channels=48), "balanced": statistics(balance=torch.ones(3)), "odd": statistics()}
    recipe = Recipe("r", 4, 6, activations=STATIC)
    plan = decide(recipe, calibration(layers), dict.fromkeys(layers, "linear"), {})
    assert plan.layers["plain"] == Scheme(4, 6, STATIC, balanced=False, group=16)
    assert "groups of 16" in plan.reasons["plain"]
    assert plan.layers["balanced"] == Scheme(8, 6, STATIC, balanced=True)
    assert "3 input channels do not divide" in plan.reasons["odd"]


def test_sixteen_bit_activations_leave_the_weight_alone() -> None:
    layers = {"conv": statistics("conv2d", channels=64), "linear": statistics(channels=64, balance=torch.ones(64))}
    kinds = {"conv": "conv2d", "linear": "linear"}
    plan = decide(Recipe("r", 4, 16), calibration(layers), kinds, {})
    assert set(plan.layers.values()) == {Scheme(4, 16, NONE, group=32)}


# --- what stays in float ----------------------------------------------------------------------------------------------


def test_everything_left_in_float_says_why() -> None:
    layers = {
        "yes": statistics(), "conv": statistics("conv2d"), "vector": statistics(vector=True), "kept": statistics(),
    }  # fmt: skip
    kinds = {"yes": "linear", "conv": "conv2d", "vector": "linear", "kept": "linear", "unseen": "linear"}
    plan = decide(PRESETS["W8A8 Linear only"], calibration(layers), kinds, {"kept": "the first layer"})
    assert set(plan.layers) == set(plan.reasons) == {"yes"}
    assert set(plan.left) == {"conv", "vector", "kept", "unseen"}
    assert plan.left["kept"] == "the first layer"
    assert "W8A8 Linear only" in plan.left["conv"]
    assert "never" in plan.left["unseen"]
    assert "one row per image" in plan.left["vector"]
    assert plan.recipe == PRESETS["W8A8 Linear only"]
    assert "conv" in decide(PRESETS["W8A8"], calibration(layers), kinds, {}).layers


def test_what_must_stay_wins_over_every_other_reason() -> None:
    layers = {"yes": statistics(), "conv": statistics("conv2d"), "vector": statistics(vector=True)}
    kinds = {"yes": "linear", "conv": "conv2d", "vector": "linear", "unseen": "linear"}
    keep = dict.fromkeys(("conv", "vector", "unseen"), "kept")
    assert decide(PRESETS["W8A8 Linear only"], calibration(layers), kinds, keep).left == keep


def test_layers_that_the_model_no_longer_has_are_not_planned() -> None:
    plan = decide(PRESETS["W8A8"], calibration({"a": statistics(), "gone": statistics()}), {"a": "linear"}, {})
    assert set(plan.layers) == {"a"} and not plan.left


@pytest.mark.parametrize(
    ("kinds", "keep"), [({}, {}), ({"a": "linear"}, {"a": "kept"}), ({"v": "linear"}, {}), ({"x": "linear"}, {})]
)
def test_nothing_to_quantize_is_an_error(kinds: dict[str, str], keep: dict[str, str]) -> None:
    found = calibration({"a": statistics(), "v": statistics(vector=True)})
    with pytest.raises(TfmqError, match="W8A8 finds no layer") as error:
        decide(PRESETS["W8A8"], found, kinds, keep)
    assert "2 layers" in str(error.value)


@pytest.mark.parametrize(("channels", "expected"), [(NARROW, STATIC), (NARROW + 32, DYNAMIC)])
def test_the_cost_may_depend_on_the_width(channels: int, expected: str) -> None:
    static = static_error(statistics(channels=channels), "mse")
    found = {"a": statistics(channels=channels, per_token=static**2 / 2)}
    plan = decide(PRESETS["W8A8"], calibration(found), {"a": "linear"}, {}, Costs(1.0, narrow=3.0))
    assert plan.layers["a"].activation == expected


def test_what_a_narrow_layer_costs() -> None:
    costs = Costs(2.0, narrow=2.5)
    assert [costs.per_token(k) for k in (1, NARROW, NARROW + 1)] == [2.5, 2.5, 2.0]
    assert Costs(2.0).per_token(1) == Costs(2.0, narrow=1.5).per_token(1) == 2.0
