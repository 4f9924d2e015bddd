"""Rotations of both kinds, their choice, and layers that use them."""

import dataclasses
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tfmq.runtime.leaf
from tfmq.decide.candidates import scheme_of
from tfmq.decide.grids import static_grid
from tfmq.files import CALIBRATION, read_calibration, read_manifest, read_tensors, write, write_calibration
from tfmq.formats.affine import channel_scale, dequantize_weight, quantize_rows, quantize_weight
from tfmq.formats.hadamard import group_of, rotate, rotate_as_means, suits_tensor_cores, unrotate
from tfmq.formats.int4 import nearest, search_grid, values
from tfmq.geometry import Geometry
from tfmq.kernels.table import BACKENDS
from tfmq.observe.calibration import Calibration
from tfmq.observe.layer import LayerObserver
from tfmq.observe.rotation import choose_rotation, find_permutations, weight_errors, zigzag
from tfmq.observe.statistics import LayerStatistics
from tfmq.runtime.leaf import QuantLinear
from tfmq.runtime.run_state import RunState
from tfmq.scheme import DYNAMIC, STATIC, Recipe, Scheme
from tfmq.solve.layer import solve_layer
from tfmq.timeline import Partition, TimeAxis

pytestmark = pytest.mark.rounding

CLOCK = RunState(TimeAxis(0, 1), Partition.uniform(1))


@pytest.mark.parametrize(("channels", "group"), [(320, 64), (1280, 256), (48, 16), (24, 0), (7, 0), (16, 16)])
def test_block_is_the_largest_power_of_two_that_divides(channels: int, group: int) -> None:
    assert group_of(channels) == group


# --- the rotations themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [16, 64, 256])
def test_rotation_is_orthogonal_symmetric_and_stays_in_its_block(group: int) -> None:
    x = torch.randn(5, 2 * group, dtype=torch.float64)
    y = rotate(x, group)
    torch.testing.assert_close(rotate(y, group), x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    one = torch.zeros(1, 2 * group, dtype=torch.float64)
    one[0, 3] = 1
    spread = rotate(one, group)[0]
    assert float(spread[:group].abs().max()) == pytest.approx(group**-0.5) == float(spread[:group].abs().min())
    assert not spread[group:].any()


def permutations(channels: int, group: int, seed: int = 0) -> Tensor:
    rows = torch.randn(32, channels, generator=torch.Generator().manual_seed(seed))
    found = find_permutations(rows, rows.abs().amax(0), group)
    assert found is not None
    return found


@pytest.mark.parametrize(("channels", "group"), [(48, 16), (320, 64), (512, 256), (80, 16)])
def test_two_passes_are_orthogonal_and_come_back(channels: int, group: int) -> None:
    p = permutations(channels, group)
    assert p.dtype == torch.int16 and p.shape == (2, channels)
    for one in p:
        assert torch.equal(one.sort().values.long(), torch.arange(channels))
    matrix = rotate(torch.eye(channels, dtype=torch.float64), group, p)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(channels, dtype=torch.float64))
    x = torch.randn(3, 4, channels, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, group, p), x @ matrix)
    torch.testing.assert_close(unrotate(rotate(x, group, p), group, p), x)
    w = torch.randn(6, channels, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, group, p) @ rotate(w, group, p).t(), x @ w.t())


def test_no_blocks_is_no_rotation() -> None:
    x = torch.randn(3, 24)
    assert torch.equal(rotate(x, 0), x) and torch.equal(unrotate(x, 0), x)


def test_permutations_of_many_channels_fit_their_type() -> None:
    channels = 2**15 + 256
    reach = torch.rand(channels)
    p = find_permutations(reach[None], reach, 256)
    assert p is not None and p.dtype == torch.int32 and int(p.max()) == channels - 1


def test_a_single_block_needs_no_permutation() -> None:
    assert find_permutations(torch.randn(4, 64), torch.rand(64), 64) is None


def test_zigzag_deals_the_widest_channels_out() -> None:
    reach = torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0])
    dealt = reach[zigzag(reach, 4)]
    assert dealt.tolist() == [9.0, 6.0, 4.0, 1.0, 8.0, 7.0, 3.0, 2.0]  # 9 | 8, then 6 | 7 backwards, ...


def test_two_passes_spread_an_outlier_over_all_channels() -> None:
    p = permutations(320, 64)
    one = torch.zeros(1, 320, dtype=torch.float64)
    one[0, 70] = 1
    assert int((rotate(one, 64)[0] != 0).sum()) == 64
    twice = rotate(one, 64, p)[0]
    assert int((twice.abs() > 1e-9).sum()) > 200
    assert float(twice.abs().max()) < 0.4


# --- how far they help ------------------------------------------------------------------------------------------------


def token_error(x: Tensor) -> float:
    codes, scale, offset = quantize_rows(x)
    return float((codes * scale + offset - x).norm() / x.norm())


def test_a_loud_block_wants_permutations() -> None:
    """Every channel of the first block is loud: H alone leaves it so."""
    torch.manual_seed(0)
    x = torch.randn(256, 320)
    x[:, :64] *= 60
    p = find_permutations(x[:64], x.abs().amax(0), 64)
    assert p is not None
    none, once, dealt, twice = (token_error(rotate(x, *how)) for how in ((0,), (64,), (64, p[:1]), (64, p)))
    assert max(dealt, twice) < 0.7 * min(none, once)


def test_the_best_kind_is_chosen_and_its_weight_judged() -> None:
    torch.manual_seed(0)
    w = torch.randn(24, 320)
    x = torch.randn(256, 320)
    x[:, :64] *= 60
    found, errors = choose_rotation(x[:64], x.abs().amax(0), w, 64)
    both = find_permutations(x[:64], x.abs().amax(0), 64)
    assert found is not None and both is not None and errors.shape == (2, 2)
    least = min(token_error(rotate(x[:64], 64, p)) for p in (None, both[:1], both))
    assert token_error(rotate(x[:64], 64, found)) == least
    torch.testing.assert_close(errors[0], weight_errors(x[:64], w))
    torch.testing.assert_close(errors[1], weight_errors(rotate(x[:64], 64, found), rotate(w, 64, found)))
    assert bool((errors[:, 1] > 20 * errors[:, 0]).all())  # 4 bits against 8
    one_block, _ = choose_rotation(x[:64, :64], x[:, :64].abs().amax(0), w[:, :64], 64)
    assert one_block is None


def test_weight_errors_are_on_the_scale_of_input_errors() -> None:
    """An input with relative white noise e^2 makes an output error of e^2 units."""
    torch.manual_seed(0)
    x, w = torch.randn(64, 320) * 3, torch.randn(24, 320) * 0.2
    scale, grid = channel_scale(w), search_grid(w, 32)
    unit = float(((torch.randn_like(x) * x.square().mean().sqrt()) @ w.t()).square().sum())
    rounded = dequantize_weight(quantize_weight(w, scale), scale), values(nearest(w, grid), grid)
    for found, r in zip(weight_errors(x, w).tolist(), rounded, strict=True):
        assert found == pytest.approx(float((x @ (r - w).t()).square().sum()) / unit, rel=0.1)


# --- layers -----------------------------------------------------------------------------------------------------------


def observed(
    loud: float, channels: int = 64, loud_channels: int = 0
) -> tuple[torch.nn.Linear, LayerStatistics, Tensor]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(channels, 24)
    x = torch.randn(200, channels)
    if loud_channels:
        x[:, :loud_channels] *= loud
    else:  # another channel in every row: no balance can mend it
        x[torch.arange(200), torch.randint(channels, (200,))] *= loud
    observer = LayerObserver(layer, 1)
    for stage in range(2):
        if stage:
            observer.end_first_stage(layer.weight)
        observer.observe(x, 0)
    found = observer.statistics()
    assert found is not None
    return layer, found, x


@pytest.mark.parametrize("activation", [STATIC, DYNAMIC])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_a_rotated_leaf_computes_what_it_says(activation: str, bits: int, balanced: bool, permuted: bool) -> None:
    """Against float64 on the rounded input and the weight that the leaf says it stands for."""
    layer, found, x = observed(10.0, channels=96)
    changes = {
        "balance": torch.rand(96) + 0.5 if balanced else None,
        "permutations": permutations(96, 32) if permuted else None,
    }
    found = dataclasses.replace(found, **changes)
    group = 32 if bits == 4 else 0
    scheme = Scheme(bits, 8, activation, balanced, rotation=32, group=group, permuted=permuted)
    state = solve_layer(scheme, found, layer.weight, "minmax")
    assert (state.permutations is not None) == permuted
    assert (
        not permuted
        or state.nbytes
        == solve_layer(dataclasses.replace(scheme, permuted=False), found, layer.weight, "minmax").nbytes + 2 * 2 * 96
    )
    leaf = QuantLinear(state, Geometry((24, 96)), CLOCK, layer.bias)
    balance = found.balance.double() if found.balance is not None else torch.ones(96, dtype=torch.float64)
    rows = rotate(x.double() / balance, 32, found.permutations)
    if activation == DYNAMIC:
        codes, scale, offset = quantize_rows(rows.float())
        rounded = codes.double() * scale.double() + offset.double()
    else:
        assert state.act_scale is not None and state.act_zero_point is not None
        scale, zero = state.act_scale.double(), state.act_zero_point.double()
        rounded = ((rows / scale).round() + zero).clamp(0, 255).sub(zero) * scale
    expected = rounded @ rotate(leaf.dequantize().double() * balance, 32, found.permutations).t()
    expected = expected + layer.bias.detach().double()
    error = (leaf(x).detach().double() - expected).norm() / expected.norm()
    assert float(error) < 1e-3  # entries that lie between two codes may fall to either side
    assert float((leaf.dequantize() - layer.weight.detach()).norm() / layer.weight.detach().norm()) < (
        0.1 if bits == 4 else 0.01
    )
    for dtype in (torch.bfloat16, torch.float16):
        y = leaf(x.to(dtype))
        assert y.dtype == dtype
        assert float((y.detach().double() - expected).norm() / expected.norm()) < 0.05


# --- on tensor cores --------------------------------------------------------------------------------------------------


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_means_in_16_bits(dtype: torch.dtype, group: int, passes: int) -> None:
    g = torch.Generator().manual_seed(group)
    x = torch.randn(50, 2 * group, generator=g).to(dtype)
    order = torch.stack([torch.randperm(2 * group, generator=g) for _ in range(2)])[:passes] if passes else None
    y, factor = rotate_as_means(x, group, order)
    expected = rotate(x.double(), group, order)
    assert y.dtype == dtype and y.shape == x.shape
    error = (y.double() * factor - expected).norm() / expected.norm()
    digits = {torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert float(error) < digits * max(1, passes) ** 0.5  # one rounding to x's type per pass, and no other


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_the_factors_are_exact_in_16_bits(group: int) -> None:
    """Of whole numbers every sum comes out as it is; 1 / sqrt(32), for one, float16 does not hold."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 10, (20, group), generator=g).half()
    y, _ = rotate_as_means(x, group)
    assert torch.equal(y.double() * group, rotate(x.double(), group).mul(group**0.5).round())


def test_float16_does_not_overflow() -> None:
    x = torch.full((2, 256), 65504.0).half()
    y, factor = rotate_as_means(x, 256)
    assert y[0, 0] == 65504 and factor == 16 and bool((y[:, 1:] == 0).all())
    y, _ = rotate_as_means(x, 256, torch.arange(256).expand(2, -1))
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", [STATIC, DYNAMIC])
@pytest.mark.parametrize("activation_bits", [8, 4])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_a_rotated_leaf_on_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, activation: str, activation_bits: int, balanced: bool,
    permuted: bool,
) -> None:  # fmt: skip
    """As good as with a rotation in float32, which is what the weight was rotated in."""
    layer, found, x = observed(10.0, channels=96)
    torch.manual_seed(1)
    balance = torch.rand(96) + 0.5 if balanced else None
    found = dataclasses.replace(found, balance=balance, permutations=permutations(96, 32) if permuted else None)
    scheme = Scheme(8, activation_bits, activation, balanced, rotation=32, permuted=permuted)
    leaf = QuantLinear(solve_layer(scheme, found, layer.weight, "minmax"), Geometry((24, 96)), CLOCK, layer.bias)
    x = x.to(dtype)
    monkeypatch.setattr(tfmq.runtime.leaf, "suits_tensor_cores", lambda x: False)
    with torch.no_grad():
        exact = layer(x.float())
        before = leaf(x)
        seen = []
        monkeypatch.setattr(tfmq.runtime.leaf, "suits_tensor_cores", lambda x: seen.append(x.dtype) or True)
        y = leaf(x)
    assert seen == [dtype] and y.dtype == dtype and not torch.equal(y, before)
    ratio = (y.float() - exact).norm() / (before.float() - exact).norm()
    # One to three roundings to x's type beside the one to 4 or 8 bits.
    assert float(ratio) < {torch.float16: 1.02, torch.bfloat16: 1.1}[dtype]


def test_on_tensor_cores_under_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfmq.runtime.leaf, "suits_tensor_cores", lambda x: x.dtype == torch.float16)
    layer, found, x = observed(10.0, channels=96)
    found = dataclasses.replace(found, balance=torch.rand(96) + 0.5, permutations=permutations(96, 32))
    scheme = Scheme(8, 8, STATIC, True, rotation=32, permuted=True)
    leaf = QuantLinear(solve_layer(scheme, found, layer.weight, "minmax"), Geometry((24, 96)), CLOCK, layer.bias)
    monkeypatch.setattr(tfmq.runtime.leaf, "pick", lambda *_: BACKENDS[-1])
    x = x.half()
    with torch.inference_mode():
        expected = leaf(x)
        torch._dynamo.reset()
        for backend in "eager", "aot_eager":
            assert torch.equal(torch.compile(leaf, backend=backend, fullgraph=True)(x), expected)


def test_on_a_gpu_alone() -> None:
    assert not suits_tensor_cores(torch.ones(1, dtype=torch.float16))
    for dtype, expected in ((torch.float16, True), (torch.bfloat16, True), (torch.float32, False)):
        there = types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
        assert suits_tensor_cores(there) == expected


def test_a_static_grid_is_that_of_the_rotated_input() -> None:
    layer, found, x = observed(40.0)
    seen = rotate(x, 64)
    assert found.rotated is not None
    assert float(found.rotated.low) == pytest.approx(float(seen.min()), rel=1e-5)
    assert float(found.rotated.high) == pytest.approx(float(seen.max()), rel=1e-5)
    state = solve_layer(Scheme(rotation=64), found, layer.weight, "minmax")
    assert state.act_scale is not None
    assert float(state.act_scale) == pytest.approx(float(seen.max() - seen.min()) / 255, rel=0.01)


@pytest.mark.parametrize("activations", [STATIC, DYNAMIC])
def test_rotation_is_decided_by_the_error_and_pays(activations: str) -> None:
    layer, found, x = observed(40.0)
    assert found.weight_error is not None
    found = dataclasses.replace(found, weight_error=found.weight_error[:1].expand(2, 2))  # the input alone decides
    recipe = Recipe("r", activations=activations)
    scheme, reason = scheme_of(recipe, found, 8)
    assert scheme.rotation == 64 and not scheme.permuted and scheme.activation == activations
    assert "rotated" in reason
    exact = layer(x).detach()
    error = {}
    for kind in (scheme, dataclasses.replace(scheme, rotation=0)):
        leaf = QuantLinear(solve_layer(kind, found, layer.weight, "mse"), Geometry((24, 64)), CLOCK, layer.bias)
        error[kind.rotation] = float((leaf(x).detach() - exact).norm() / exact.norm())
    assert error[64] < 0.75 * error[0]


def test_permutations_beat_hadamard_which_beats_none() -> None:
    """Most of one block is loud, and no balance may mend it."""
    layer, found, x = observed(30.0, channels=320, loud_channels=24)
    assert found.permutations is not None
    found = dataclasses.replace(found, balance=None)
    p = find_permutations(x[:64], x.abs().amax(0), 64)
    exact = layer(x).detach()
    error = []
    for permutations, rotation in ((None, 0), (None, 64), (p, 64)):
        scheme = Scheme(activation=DYNAMIC, rotation=rotation, permuted=permutations is not None)
        state = solve_layer(scheme, dataclasses.replace(found, permutations=permutations), layer.weight, "mse")
        leaf = QuantLinear(state, Geometry((24, 320)), CLOCK, layer.bias)
        error.append(float((leaf(x).detach() - exact).norm() / exact.norm()))
    assert error[2] < 0.85 * error[1] < 0.85 * error[0]


def test_a_weight_that_suffers_more_forbids_it() -> None:
    _, found, _ = observed(40.0)
    recipe = Recipe("r", activations=DYNAMIC)
    worse = torch.tensor([[1e-6, 1e-3], [1e-6, 1.1e-3]], dtype=torch.float64)
    found = dataclasses.replace(found, weight_error=worse)
    assert scheme_of(recipe, found, 8)[0].rotation == 64
    assert scheme_of(recipe, found, 4)[0].rotation == 0


def test_even_input_is_not_rotated() -> None:
    found = observed(1.0)[1]
    for activations in ("auto", STATIC, DYNAMIC):
        assert scheme_of(Recipe("r", activations=activations), found, 8)[0].rotation == 0


# --- the sidecar ------------------------------------------------------------------------------------------------------


def kept(found: LayerStatistics, path: Path) -> LayerStatistics:
    write_calibration(path, Calibration("m", "EPS", TimeAxis(0, 1), Partition.uniform(1), {"layer": found}, {}))
    return read_calibration(path).layers["layer"]


def test_what_was_learnt_about_the_rotated_input_is_kept(tmp_path: Path) -> None:
    _, found, _ = observed(30.0, channels=320, loud_channels=24)
    got = kept(found, tmp_path / "c.safetensors")
    assert got.rotated is not None and found.rotated is not None and got.permutations is not None
    assert torch.equal(got.permutations, found.permutations) and torch.equal(got.weight_error, found.weight_error)
    for name in ("low", "high", "bin_low", "bin_high", "row_error"):
        assert torch.equal(getattr(got.rotated, name), getattr(found.rotated, name))
    for activations in (STATIC, DYNAMIC):
        recipe = Recipe("r", activations=activations)
        assert scheme_of(recipe, got, 8)[0] == scheme_of(recipe, found, 8)[0]
    scheme = Scheme(rotation=64, permuted=True)
    for mine, its in zip(static_grid(got.under(scheme), "mse"), static_grid(found.under(scheme), "mse"), strict=True):
        torch.testing.assert_close(mine.float(), its.float(), rtol=1e-2, atol=1)


def test_a_sidecar_of_the_first_version_rotates_per_token_layers(tmp_path: Path) -> None:
    _, found, _ = observed(40.0)
    assert found.rotated is not None
    error = found.rotated.row_error
    path = tmp_path / "c.safetensors"
    kept(dataclasses.replace(found, rotated=None, permutations=None, weight_error=None), path)
    write(path, read_tensors(path) | {"layer:rotated_error": error}, read_manifest(path, CALIBRATION))
    old = read_calibration(path).layers["layer"]
    assert scheme_of(Recipe("r", activations=DYNAMIC), old, 8)[0].rotation == 64
    assert scheme_of(Recipe("r", activations=STATIC), old, 8)[0].rotation == 0
