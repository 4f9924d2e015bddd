"""What only the Triton backend has: 4-bit weights, split products, norms, custom operations.

Run by test_triton.py in a process of its own, in Triton's interpreter. There the float arithmetic is numpy's, rounded
after every operation as torch's is, so that most results must be equal, not near.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tfmq.formats import int4
from tfmq.formats.affine import affine_grid, quantize_affine, quantize_rows
from tfmq.geometry import Geometry, Norm, StaticInput
from tfmq.kernels import reference, table, trial
from tfmq.kernels.triton import (
    backend as triton_backend,
)
from tfmq.kernels.triton import (
    int_mm as triton_int_mm,
)
from tfmq.kernels.triton import (
    launch as triton_launch,
)
from tfmq.kernels.triton import (
    ops as triton_ops,
)
from tfmq.kernels.triton.launch import Prepared, tuner
from tfmq.kernels.triton.tune import Tile
from tfmq.runtime import norm_silu_conv
from tfmq.runtime.leaf import QuantConv2d
from tfmq.runtime.run_state import RunState
from tfmq.scheme import STATIC, Scheme
from tfmq.state import LayerState
from tfmq.timeline import Partition, TimeAxis

SMALL = Tile(32, 32, 64, 1, 4, 2)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, SMALL)


def use(monkeypatch: pytest.MonkeyPatch, tile: Tile) -> None:
    monkeypatch.setattr(tuner, "choose", lambda *_: tile)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid_of(channels: int | None, zero_point: int = 99, scale: float = 0.031, seed: int = 0) -> StaticInput:
    inverse = None if channels is None else torch.rand(channels, generator=generator(seed)) + 0.5
    return StaticInput(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32), inverse)


def packed_of(geometry: Geometry, wanted: int, seed: int) -> int4.Packed:
    """A random packed weight in which every factor, every zero and every code occurs, as far as int8 holds them."""
    g = generator(seed)
    n, c = geometry.shape[:2]
    columns = c * (geometry.shape[2] * geometry.shape[3] if geometry.is_conv else 1)
    group = int4.group_for(c, wanted)
    assert group == wanted
    codes = torch.randint(0, 16, (n, columns), generator=g).to(torch.uint8)
    zero = torch.randint(0, 16, (n, columns // group), generator=g)
    factor = torch.randint(1, 16, zero.shape, generator=g)
    factor = torch.minimum(factor, 127 // torch.maximum(zero, 15 - zero))
    scale = torch.rand(n, generator=g) * 0.01 + 0.001
    grid = int4.Grid(scale, factor.to(torch.uint8), zero.to(torch.uint8), group)
    return int4.Packed(int4.pack(codes), grid, geometry.shape)


def near(y: Tensor, truth: Tensor) -> None:
    assert y.dtype == truth.dtype and y.shape == truth.shape
    assert torch.equal(y, truth), f"worst difference {float((y.double() - truth.double()).abs().max())}"


# --- 4-bit weights --------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    st.sampled_from([(16, 16), (48, 16), (32, 32), (96, 32), (64, 64), (192, 64), (128, 128), (384, 128)]),
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.booleans(), st.sampled_from([64, 128]),
    st.sampled_from([1, 2, 4]), st.integers(0, 1 << 30),
)  # fmt: skip
def test_four_bit_weights(
    channels: tuple[int, int], n: int, m: int, kernel: int, dynamic: bool, bk: int, split: int, seed: int
) -> None:
    c, group = channels
    conv = kernel == 3
    geometry = Geometry((n, c, 3, 3), padding=(1, 1)) if conv else Geometry((n, c))
    packed = packed_of(geometry, group, seed)
    prepared = triton_backend.prepare_packed(packed, geometry)
    truth = reference.prepare(packed.int8(), packed.grid.scale, geometry)
    x = torch.randn((1, c, 1 + m % 5, 1 + m % 3) if conv else (m, c), generator=generator(seed)) * 3
    grid = grid_of(c)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, SMALL._replace(k=bk, split=split))
        if conv:
            y, expected = (b.conv2d_static(x, p, grid, None) for b, p in both(prepared, truth))
        elif dynamic:
            y, expected = (b.linear_dynamic(x, p, grid.inverse_balance, None) for b, p in both(prepared, truth))
        else:
            y, expected = (b.linear_static(x, p, grid, None) for b, p in both(prepared, truth))
    near(y, expected)


@pytest.mark.parametrize("shape", [(5, 24), (4, 16, 3, 3), (4, 32, 1, 1), (3, 5, 3, 2)])
def test_the_codes_are_a_view_of_what_the_kernels_read(shape: tuple[int, ...]) -> None:
    codes, geometry = torch.randint(-127, 128, shape, dtype=torch.int8), Geometry(shape)
    prepared = triton_backend.prepare(codes, torch.ones(shape[0]), geometry)
    view = triton_backend.view(prepared)
    assert torch.equal(view, codes) and view.data_ptr() == prepared.codes.data_ptr()
    again = triton_backend.prepare(view, torch.ones(shape[0]), geometry)
    assert torch.equal(again.codes, prepared.codes)
    if shape[1] % 16 == 0:
        assert again.codes.data_ptr() == prepared.codes.data_ptr()  # nothing is copied the second time


def both(prepared: Prepared, truth: reference.Prepared) -> tuple:
    return (triton_backend, prepared), (reference, truth)


def test_packed_codes_are_kept_as_they_are() -> None:
    geometry = Geometry((6, 32, 3, 3))
    packed = packed_of(geometry, 32, 0)
    prepared = triton_backend.prepare_packed(packed, geometry)
    assert prepared.codes.data_ptr() == packed.codes.data_ptr()
    assert torch.equal(prepared.sums, packed.int8().flatten(1).sum(1).int())


@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_of_4_and_of_8_bits_read_the_same_codes(dynamic: bool) -> None:
    """As q, k and v do (tfmq/runtime/shared_input.py) where the bits were chosen for each."""
    geometry = Geometry((24, 48))
    weights = (
        triton_backend.prepare_packed(packed_of(geometry, 16, 0), geometry),
        triton_backend.prepare(*layer(geometry, 1), geometry),
    )
    x, grid, bias = torch.randn(3, 5, 48, generator=generator(0)), grid_of(48), torch.randn(24)
    for first in weights:
        if dynamic:
            codes = triton_backend.quantize_dynamic(x, first, grid.inverse_balance)
            expected = [triton_backend.linear_dynamic(x, w, grid.inverse_balance, bias) for w in weights]
        else:
            codes = triton_backend.quantize_static(x, first, grid)
            expected = [triton_backend.linear_static(x, w, grid, bias) for w in weights]
        for w, y in zip(weights, expected, strict=True):
            near(triton_backend.multiply(codes, w, bias), y)


# --- the epilogue ---------------------------------------------------------------------------------------------------


def layer(geometry: Geometry, seed: int, top: int = 127) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    codes = torch.randint(-top, top + 1, geometry.shape, generator=g).to(torch.int8)
    return codes, torch.rand(geometry.shape[0], generator=g) * 0.01 + 0.001


@pytest.mark.parametrize("split", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_come_out_as_they_are(monkeypatch: pytest.MonkeyPatch, split: int, dtype: torch.dtype) -> None:
    """All scales 1: the result is the integer sum itself, which float32 holds here."""
    use(monkeypatch, SMALL._replace(split=split))
    geometry = Geometry((37, 21, 3, 3), (2, 2), (1, 1))
    codes, _ = layer(geometry, 1)
    x = torch.randint(-99, 157, (9, 21, 5, 7), generator=generator(2))
    expected = F.conv2d(x.double(), codes.double(), stride=2, padding=1)
    assert float(expected.abs().max()) < 2**24
    prepared = triton_backend.prepare(codes, torch.ones(37), geometry)
    y = triton_backend.conv2d_static(x.to(dtype), prepared, grid_of(None, scale=1.0), None)
    near(y, expected.to(dtype) if dtype == torch.float32 else expected.float().to(dtype))


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_rounded_once(monkeypatch: pytest.MonkeyPatch, split: int, dtype: torch.dtype) -> None:
    use(monkeypatch, SMALL._replace(split=split))
    g = generator(3)
    bias = torch.randn(13, generator=g)
    for name, geometry, shape in (
        ("linear_static", Geometry((13, 130)), (3, 7, 130)),
        ("linear_dynamic", Geometry((13, 130)), (3, 7, 130)),
        ("conv2d_static", Geometry((13, 130, 1, 1)), (2, 130, 3, 5)),
        ("conv2d_static", Geometry((13, 130, 3, 3), padding=(1, 1)), (2, 130, 3, 5)),
    ):
        codes, scale = layer(geometry, 4)
        x = torch.randn(shape, generator=g).to(dtype)
        how = grid_of(130) if name != "linear_dynamic" else grid_of(130).inverse_balance
        prepared = triton_backend.prepare(codes, scale, geometry)
        plain = getattr(reference, name)(x.float(), reference.prepare(codes, scale, geometry), how, bias)
        near(getattr(triton_backend, name)(x, prepared, how, bias), plain.to(dtype))


def test_what_float16_cannot_hold() -> None:
    """Beyond 65504 comes infinity, as from a float16 layer; a sum that the bias brings back is exact to rounding."""
    geometry = Geometry((16, 64))
    codes = torch.full(geometry.shape, 127, dtype=torch.int8)
    prepared = triton_backend.prepare(codes, torch.full((16,), 0.1), geometry)
    x = torch.full((2, 64), 100.0, dtype=torch.float16)
    x[1] = -20
    grid = grid_of(None, 51, 0.5)
    y = triton_backend.linear_static(x, prepared, grid, None)
    truth = reference.linear_static(x, reference.prepare(codes, torch.full((16,), 0.1), geometry), grid, None)
    assert bool(torch.isposinf(y[0]).all()) and bool(torch.isfinite(y[1]).all())
    near(y, truth)
    back = triton_backend.linear_static(x, prepared, grid, torch.full((16,), -60000.0))
    assert bool((back[0] == torch.tensor(81280.0 - 60000.0).half()).all())


def test_empty_batches() -> None:
    codes, scale = layer(Geometry((5, 16)), 0)
    prepared = triton_backend.prepare(codes, scale, Geometry((5, 16)))
    assert triton_backend.linear_static(torch.empty(0, 16), prepared, grid_of(16), None).shape == (0, 5)
    assert triton_backend.linear_dynamic(torch.empty(2, 0, 16), prepared, None, None).shape == (2, 0, 5)
    geometry = Geometry((5, 16, 3, 3), padding=(1, 1))
    codes, scale = layer(geometry, 0)
    prepared = triton_backend.prepare(codes, scale, geometry)
    y = triton_backend.conv2d_static(torch.empty(0, 16, 4, 4), prepared, grid_of(16), None)
    assert y.shape == (0, 5, 4, 4)
    ones = torch.ones(16)
    assert triton_launch.group_norm(torch.empty(0, 16, 4, 4), 4, ones, ones, 1e-5).gain.shape == (0, 16)


# --- codes ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.integers(1, 3), st.integers(1, 200), st.integers(1, 7), st.integers(1, 7), st.tuples(*[st.integers(0, 2)] * 2),
    st.sampled_from(DTYPES), st.sampled_from([0, 99, 255]), st.booleans(), st.booleans(), st.integers(0, 1 << 30),
)  # fmt: skip
def test_codes_of_images(
    b: int, c: int, h: int, w: int, padding: tuple[int, int], dtype: torch.dtype, zero_point: int, balanced: bool,
    last: bool, seed: int,
) -> None:  # fmt: skip
    x = (torch.randn(b, c, h, w, generator=generator(seed)) * 4).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    grid = grid_of(c if balanced else None, zero_point, seed=seed)
    channels = triton_launch.round_up(c)
    q = triton_launch.quantize_image(x, grid, channels, padding)
    inverse = None if grid.inverse_balance is None else grid.inverse_balance[:, None, None]
    expected = quantize_affine(x, grid.scale, grid.zero_point, inverse).int() - 128
    border = (padding[1], padding[1], padding[0], padding[0])
    expected = F.pad(expected, (*border, 0, channels - c), value=zero_point - 128)
    assert torch.equal(q.int(), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("k", [1, 70, 4097, 9000])
def test_codes_of_rows(bits: int, k: int) -> None:
    """Also of rows that are longer than what a program holds, of constant ones and of strided ones."""
    x = torch.randn(k, 5, generator=generator(k)).t() * 3
    x[1] = 0.25
    x[2] = 0.0
    inverse = torch.rand(k, generator=generator(1)) + 0.5
    for balance in (None, inverse):
        rows = triton_launch.quantize_rows(x, balance, bits, triton_launch.round_up(k))
        codes, scale, offset = quantize_rows(x, balance, bits)
        assert torch.equal(rows.codes[:, :k], codes)
        assert int(rows.codes[:, k:].abs().sum()) == 0
        assert torch.equal(rows.scale, scale.flatten()) and torch.equal(rows.offset, offset.flatten())


def test_ties_go_to_even_and_what_is_far_out_is_clipped() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, 65504.0, float("inf"), float("-inf")]])
    q = triton_launch.quantize_matrix(x, grid_of(None, 100, 1.0), 16)
    assert (q[0, :10].int() + 128).tolist() == [100, 102, 102, 100, 98, 255, 0, 255, 255, 0]


# --- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 32, 4, 4), 8), ((1, 30, 3, 5), 3), ((9, 8, 1, 1), 2), ((1, 96, 20, 20), 32), ((1, 4, 65, 67), 2)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_group_norm_silu_and_quantization(
    shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype, last: bool
) -> None:
    g = generator(5)
    x = (torch.randn(shape, generator=g) * 2 + 30).to(dtype)  # a mean far from zero: no square of it may be subtracted
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    c = shape[1]
    weight, bias = torch.randn(c, generator=g).to(dtype), torch.randn(c, generator=g).to(dtype)
    norm = triton_launch.group_norm(x, groups, weight, bias, 1e-5)
    expected = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    got = x.double() * norm.gain.double()[:, :, None, None] + norm.shift.double()[:, :, None, None]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)
    grid = grid_of(c, 30)
    channels = triton_launch.round_up(c)
    for silu in (False, True):
        q = triton_launch.quantize_image(x, grid, channels, (1, 1), norm, silu)
        value = (F.silu(expected) if silu else expected).float()
        codes = quantize_affine(value, grid.scale, grid.zero_point, grid.inverse_balance[:, None, None]).int() - 128
        off = (q[:, 1:-1, 1:-1, :c].int() - codes.permute(0, 2, 3, 1)).abs()
        assert int(off.max()) <= 1 and float(off.float().mean()) < 0.01  # rounded to the other side of a tie
        border = q.clone()
        border[:, 1:-1, 1:-1] = 30 - 128
        assert bool((border == 30 - 128).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("geometry", [Geometry((5, 24, 3, 3), (2, 2), (1, 1)), Geometry((5, 24, 1, 1))], ids=str)
def test_a_convolution_with_its_norm(geometry: Geometry, last: bool, dtype: torch.dtype) -> None:
    g = generator(7)
    codes, scale = layer(geometry, 8)
    bias = torch.randn(5, generator=g).to(dtype)
    prepared, truth = triton_backend.prepare(codes, scale, geometry), reference.prepare(codes, scale, geometry)
    for batch, groups, grid in ((1, 3, grid_of(24, 30)), (3, 8, grid_of(None, 30))):
        x = (torch.randn(batch, 24, 5, 7, generator=g) * 2 + 30).to(dtype)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        norm = Norm(groups, torch.randn(24, generator=g).to(dtype), torch.randn(24, generator=g).to(dtype), 1e-5)
        y = triton_backend.conv2d_static_normed(x, prepared, grid, bias, norm)
        value = F.silu(F.group_norm(x.double(), groups, norm.weight.double(), norm.bias.double(), 1e-5)).float()
        expected = reference.conv2d_static(value, truth, grid, bias)
        assert y.dtype == dtype and y.shape == expected.shape
        # A code on the other side of a tie is one off; x's dtype is rounded to once, at the end.
        bound = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 5e-3}[dtype]
        assert float((y.double() - expected.double()).norm() / expected.double().norm()) < bound


def test_a_leaf_takes_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = next(b for b in table.BACKENDS if b.module is triton_backend)
    monkeypatch.setattr("tfmq.runtime.leaf.pick", lambda *_: backend)
    geometry = Geometry((6, 16, 3, 3), padding=(1, 1))
    codes, scale = layer(geometry, 0)
    act = affine_grid(torch.full((4,), -0.3), torch.arange(1.0, 5.0))
    state = LayerState("conv2d", Scheme(activation=STATIC), geometry.shape, codes, scale, None, *act)
    leaf = QuantConv2d(state, geometry, RunState(TimeAxis(0.0, 1000.0), Partition.uniform(4)), torch.randn(6))
    sequence = torch.nn.Sequential(torch.nn.GroupNorm(4, 16), torch.nn.SiLU(), leaf).eval()
    with torch.inference_mode():
        x = torch.randn(2, 16, 4, 4) * 3
        plain = sequence(x)
        images = []
        normed = triton_launch.group_norm
        monkeypatch.setattr(triton_launch, "group_norm", lambda x, *rest: images.append(x) or normed(x, *rest))
        found = norm_silu_conv.run(sequence, x)
    assert images == [x]
    assert float((found - plain).norm() / plain.norm()) < 5e-3


# --- under torch.compile --------------------------------------------------------------------------------------------


def operations() -> list[tuple]:
    """name, input, the rest of the arguments."""
    linear, conv = Geometry((13, 24)), Geometry((13, 24, 3, 3), (2, 2), (1, 1))
    bias = torch.randn(13, generator=generator(0))
    prepared = {g: triton_backend.prepare(*layer(g, 0), g) for g in (linear, conv)}
    packed_geometry = Geometry((13, 32))
    packed = triton_backend.prepare_packed(packed_of(packed_geometry, 16, 0), packed_geometry)
    return [
        ("linear_static", torch.randn(2, 5, 24), (prepared[linear], grid_of(24), bias)),
        ("linear_dynamic", torch.randn(2, 5, 24), (prepared[linear], grid_of(24).inverse_balance, bias, 8)),
        ("linear_static", torch.randn(5, 32), (packed, grid_of(None), None)),
        ("conv2d_static", torch.randn(2, 24, 5, 7), (prepared[conv], grid_of(24), bias)),
    ]


@pytest.mark.parametrize("which", range(4))
def test_a_compiled_graph_holds_them_whole(which: int) -> None:
    name, x, rest = operations()[which]
    run = getattr(triton_backend, name)
    expected = run(x, *rest)
    compiled = torch.compile(lambda x: run(x, *rest) + 1, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert torch.equal(y, expected + 1) and y.stride() == (expected + 1).stride()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(lambda x: run(x, *rest) + 1, backend=backend, fullgraph=True)(x)
    assert any(f"tfmq.{name}" in target for target in seen)


@pytest.mark.parametrize("which", range(4))
def test_the_custom_operations_keep_what_they_declare(which: int) -> None:
    name, x, rest = operations()[which]
    weight, *others = rest
    arguments: tuple = (x, *weight[:6])
    if name == "linear_dynamic":
        arguments += (others[0], others[1], others[2])
    else:
        arguments += (*others[0], others[1])
    if name == "conv2d_static":
        g = weight.geometry
        arguments += (list(g.shape), [*g.stride, *g.padding, *g.dilation])
    torch.library.opcheck(getattr(torch.ops.tfmq, name).default, arguments)


@pytest.mark.parametrize("which", range(4))
def test_without_custom_operations_a_graph_breaks_and_no_result(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "REGISTERED", False)
    monkeypatch.setattr(triton_ops, "_outside_of_graphs", torch.compiler.disable(triton_ops._plain))
    name, x, rest = operations()[which]
    run = getattr(triton_backend, name)
    expected = run(x, *rest)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    y = torch.compile(lambda x: run(x + 1 - 1, *rest) + 1, backend=backend)(x)
    assert torch.equal(y, run(x + 1 - 1, *rest) + 1) and expected.shape == y.shape
    assert len(graphs) == 2


def test_a_compiled_leaf_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all intervals: the row of the table is read on the device."""
    backend = next(b for b in table.BACKENDS if b.module is triton_backend)
    monkeypatch.setattr("tfmq.runtime.leaf.pick", lambda *_: backend)
    geometry = Geometry((6, 16, 3, 3), padding=(1, 1))
    codes, scale = layer(geometry, 0)
    high = torch.arange(1.0, 5.0)
    scheme = Scheme(activation=STATIC)
    state = LayerState("conv2d", scheme, geometry.shape, codes, scale, None, *affine_grid(-high, high))
    clock = RunState(TimeAxis(0.0, 1000.0), Partition.uniform(4))
    leaf = QuantConv2d(state, geometry, clock, torch.randn(6))
    graphs = []

    def backend_of_compile(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.inference_mode():
        x = torch.randn(2, 16, 4, 4) * 3
        leaf(x)  # prepares the weight
        compiled = torch.compile(leaf, backend=backend_of_compile, fullgraph=True)
        seen = []
        for t in (900.0, 600.0, 400.0, 100.0):
            clock.set(torch.tensor([t]))
            seen.append(compiled(x))
            near(seen[-1], leaf(x))
    assert len(graphs) == 1
    assert not torch.equal(seen[0], seen[-1])


# --- whether it works at all ----------------------------------------------------------------------------------------


def test_a_trial_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> str | None:
        monkeypatch.setattr(trial, "_found", {})
        return trial.fault("triton", triton_backend, torch.device("cpu"))

    assert found() is None
    product, quantize = triton_launch.product, triton_launch.quantize_image
    with monkeypatch.context() as patch:
        patch.setattr(triton_launch, "product", lambda *args, **more: product(*args, **more) * 1.01)
        assert "computes wrongly here (error of 0.01 in a small linear_static)" in found()
    with monkeypatch.context() as patch:
        patch.setattr(triton_launch, "quantize_image", lambda *args: quantize(*args) ^ 1)
        assert "computes wrongly here" in found()
    with monkeypatch.context() as patch:

        def raises(*_: object) -> None:
            raise RuntimeError("PTX was compiled with an unsupported toolchain")

        patch.setattr(triton_launch, "quantize_image", raises)
        assert "unsupported toolchain" in found()
    assert found() is None


# --- around torch's int8 product ------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from(DTYPES), st.booleans(), st.booleans(),
    st.integers(0, 1 << 30),
)  # fmt: skip
def test_linear_around_torch_product(
    m: int, n: int, k: int, dtype: torch.dtype, dynamic: bool, biased: bool, seed: int
) -> None:
    """Sizes that cuBLAS would not take."""
    geometry, g = Geometry((n, k)), generator(seed)
    codes, scale = layer(geometry, seed)
    prepared = triton_int_mm.prepare(codes, scale, geometry)
    assert prepared.codes.shape[0] % 8 == 0 and prepared.codes.shape[1] % 16 == 0
    assert torch.equal(triton_int_mm.view(prepared), codes)
    x, bias = torch.randn(m, k, generator=g).to(dtype), torch.randn(n, generator=g).to(dtype) if biased else None
    name, how = ("linear_dynamic", grid_of(k).inverse_balance) if dynamic else ("linear_static", grid_of(k))
    plain = getattr(reference, name)(x.float(), reference.prepare(codes, scale, geometry), how, bias)
    near(getattr(triton_int_mm, name)(x, prepared, how, bias), plain.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry((13, 24, 3, 3), (1, 1), (1, 1)), Geometry((8, 16, 3, 3), (2, 2), (1, 1)),
        Geometry((5, 5, 3, 2), (2, 1), (0, 2), (2, 3)), Geometry((16, 32, 1, 1)), Geometry((9, 7, 1, 1), (2, 2)),
        Geometry((9, 7, 1, 1), (1, 1), (1, 0)),
    ],
    ids=str,
)  # fmt: skip
def test_convolutions_around_torch_product(
    geometry: Geometry, last: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = generator(0)
    n, c = geometry.shape[:2]
    codes, scale = layer(geometry, 1)
    x, bias = torch.randn(3, c, 7, 9, generator=g).to(dtype), torch.randn(n, generator=g).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    prepared = triton_int_mm.prepare(codes, scale, geometry)
    assert torch.equal(triton_int_mm.view(prepared), codes)
    for grid in (grid_of(c), grid_of(None, 3)):
        plain = reference.conv2d_static(x.float(), reference.prepare(codes, scale, geometry), grid, bias)
        for most in (triton_int_mm.PATCH_BYTES, 1):  # all images at a time, and one
            monkeypatch.setattr(triton_int_mm, "PATCH_BYTES", most)
            near(triton_int_mm.conv2d_static(x, prepared, grid, bias), plain.to(dtype))
    y = triton_int_mm.conv2d_static(x, prepared, grid_of(c), bias)
    assert y.permute(0, 2, 3, 1).is_contiguous()
    assert triton_int_mm.conv2d_static(x[:0], prepared, grid_of(c), bias).shape == (0, *y.shape[1:])


def test_a_compiled_graph_has_the_plain_product() -> None:
    linear, conv = Geometry((13, 24)), Geometry((13, 24, 3, 3), (2, 2), (1, 1))
    bias, grid = torch.randn(13, generator=generator(0)), grid_of(24)
    prepared = {geometry: triton_int_mm.prepare(*layer(geometry, 0), geometry) for geometry in (linear, conv)}
    calls = [
        lambda x: triton_int_mm.linear_static(x, prepared[linear], grid, bias),
        lambda x: triton_int_mm.linear_dynamic(x, prepared[linear], grid.inverse_balance, bias),
        lambda x: triton_int_mm.conv2d_static(x, prepared[conv], grid, bias),
    ]
    for call, x in zip(calls, (torch.randn(2, 5, 24), torch.randn(2, 5, 24), torch.randn(2, 24, 5, 7)), strict=True):
        near(torch.compile(call, backend="eager", fullgraph=True)(x), call(x))


def test_the_trial_of_what_is_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_found", {})
    assert trial.fault("triton_int_mm", triton_int_mm, torch.device("cpu")) is None
