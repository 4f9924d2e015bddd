"""The reference against exact integer arithmetic, every other backend that runs here against the reference.

Inputs of the exact tests lie on the grid (scale a power of two), so that their codes are known without quantizing and
the product can be computed in float64, where it is exact.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from support.backends import DEVICES, able
from tfmq.formats.affine import dequantize_weight
from tfmq.geometry import Geometry, StaticInput, geometry_of
from tfmq.kernels import int8_product, int_mm, onednn, reference
from tfmq.kernels.table import BACKENDS, CONV2D_STATIC, LINEAR_DYNAMIC, LINEAR_STATIC, Backend, pick, refusals

pytestmark = pytest.mark.rounding
ROOT = Path(__file__).resolve().parent.parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
ZERO_POINTS = [0, 1, 117, 128, 254, 255]
# These do not quantize their input, or on another grid, and so are not comparable: tests/unit/test_float_conv.py,
# test_float_product.py, test_kitchen.py.
INEXACT = {"float_conv", "float_product", "kitchen"}


def place(operation: str) -> pytest.MarkDecorator:
    """Every backend and device that runs the operation here."""
    cases = [(b, d) for d in DEVICES for b in able(operation, d) if b.name not in INEXACT]
    return pytest.mark.parametrize(("backend", "device"), cases, ids=[f"{b.name}-{d}" for b, d in cases])


def integers(shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    """int64, uniform in low .. high, both ends surely among them where there is room."""
    g = torch.Generator().manual_seed(seed)
    out = torch.randint(low, high + 1, shape, generator=g)
    if out.numel() > 1:
        flat = out.view(-1)
        flat[int(torch.randint(0, flat.numel(), (), generator=g))] = low
        flat[int(torch.randint(0, flat.numel(), (), generator=g))] = high
    return out


@dataclass
class Case:
    """One layer with its input, and what must come out (float64)."""

    x: Tensor
    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    grid: StaticInput | None
    inverse: Tensor | None
    geometry: Geometry
    expected: Tensor
    reach: Tensor  # sum of the magnitudes of all terms, for the tolerance

    def run(self, backend: Backend, operation: str, device: str) -> Tensor:
        def there(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        prepared = backend.module.prepare(self.codes.to(device), self.scale.to(device), self.geometry)
        function = getattr(backend.module, operation)
        if operation == LINEAR_DYNAMIC:
            return function(self.x.to(device), prepared, there(self.inverse), there(self.bias)).cpu()
        assert self.grid is not None
        scale, zero_point = self.grid.scale.to(device), self.grid.zero_point.to(device)
        grid = StaticInput(scale, zero_point, there(self.grid.inverse_balance))
        return function(self.x.to(device), prepared, grid, there(self.bias)).cpu()

    def check(self, y: Tensor) -> None:
        assert y.dtype == self.x.dtype
        assert y.shape == self.expected.shape
        bound = EPS[y.dtype] * self.expected.abs() + 4 * EPS[torch.float32] * self.reach + 1e-30
        error = (y.double() - self.expected).abs()
        assert bool((error <= bound).all()), f"worst {float((error / bound).max())} of the bound"


def bias_of(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (integers((n,), -100, 100, seed).double() / 8).to(dtype)


def balance_of(k: int, seed: int) -> Tensor:
    """Powers of two: multiplying by them is exact."""
    return 2.0 ** integers((k,), -2, 2, seed).float()


def static_case(
    shape: tuple[int, ...], geometry: Geometry, dtype: torch.dtype, zero_point: int, biased: bool, balanced: bool,
    seed: int,
) -> Case:  # fmt: skip
    n = geometry.shape[0]
    channel_dim = 1 if geometry.is_conv else len(shape) - 1
    q = integers(shape, 0, 255, seed)
    real = (q - zero_point).double() * 2.0**-5
    codes = integers(geometry.shape, -127, 127, seed + 1)
    scale = torch.rand(n, generator=torch.Generator().manual_seed(seed + 2)) * 0.01 + 0.001
    weight = codes.double() * scale.double().reshape(-1, *[1] * (codes.dim() - 1))
    bias = bias_of(n, dtype, seed + 3) if biased else None
    exact_bias = None if bias is None else bias.double()
    inverse = balance_of(shape[channel_dim], seed + 4) if balanced else None
    x = real
    if inverse is not None:
        x = real / inverse.double().reshape([-1 if d == channel_dim else 1 for d in range(len(shape))])
    if geometry.is_conv:
        more = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        expected = F.conv2d(real, weight, exact_bias, *more)
        reach = F.conv2d(real.abs() + 8.0, weight.abs(), None, *more)
    else:
        expected = F.linear(real, weight, exact_bias)
        reach = F.linear(real.abs() + 8.0, weight.abs(), None)
    grid = StaticInput(torch.tensor([2.0**-5]), torch.tensor([zero_point], dtype=torch.int32), inverse)
    assert bool((x.to(dtype).double() == x).all())  # the case's own premise
    return Case(x.to(dtype), codes.to(torch.int8), scale, bias, grid, None, geometry, expected, reach + 13.0)


def dynamic_case(shape: tuple[int, ...], n: int, dtype: torch.dtype, biased: bool, balanced: bool, seed: int) -> Case:
    """Every row spans exactly 255 steps of its own power-of-two grid."""
    k = shape[-1]
    rows = integers((*shape[:-1], k), 0, 255, seed)
    if k > 1:
        rows[..., 0], rows[..., -1] = 0, 255
    offset = integers((*shape[:-1], 1), -255, 0, seed + 1)
    step = 2.0 ** integers((*shape[:-1], 1), -6, -2, seed + 2).double()
    real = (rows + offset).double() * step
    codes = integers((n, k), -127, 127, seed + 3)
    scale = torch.rand(n, generator=torch.Generator().manual_seed(seed + 4)) * 0.01 + 0.001
    weight = codes.double() * scale.double().unsqueeze(1)
    bias = bias_of(n, dtype, seed + 5) if biased else None
    inverse = balance_of(k, seed + 6) if balanced else None
    x = real if inverse is None else real / inverse.double()
    expected = F.linear(real, weight, None if bias is None else bias.double())
    reach = F.linear((rows.double() * 2 + offset.abs().double() + 255) * step, weight.abs()) + 13.0
    assert bool((x.to(dtype).double() == x).all())
    return Case(
        x.to(dtype), codes.to(torch.int8), scale, bias, None, inverse, Geometry((n, k)), expected, reach
    )  # fmt: skip


def awkward(x: Tensor) -> Tensor:
    """The same values behind other strides: every second column of a wider tensor, dimensions stored in reverse."""
    wide = torch.full((*reversed(x.shape[:-1]), 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    order = [*reversed(range(x.dim() - 1)), x.dim() - 1]
    view = wide.permute(order)[..., ::2]
    view.copy_(x)
    assert x.numel() < 2 or not view.is_contiguous()
    return view


# --- the exact integer product --------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 7, 511, 512, 513, 1025]), st.integers(0, 1 << 30))
@settings(max_examples=30)
def test_integer_matmul_is_exact(m: int, n: int, k: int, seed: int) -> None:
    a = integers((m, k), 0, 255, seed)
    b = integers((n, k), -127, 127, seed + 1)
    expected = a @ b.t()  # int64
    for q in (a.int(), a.to(torch.uint8)):
        for product in (reference.integer_matmul, reference.chunked_matmul):
            got = product(q, b.to(torch.int8))
            assert got.dtype == torch.int32
            assert torch.equal(got.long(), expected)
    padded = int_mm.prepare(b.to(torch.int8), torch.ones(n), Geometry((n, k)))
    assert torch.equal(int_mm.matmul((a - 128).to(torch.int8), padded).long(), (a - 128) @ b.t())


def test_the_float_chunks_are_as_long_as_exactness_allows() -> None:
    """All products at their greatest, and an odd one: the sum needs every bit of the mantissa."""
    for k in (reference.EXACT_CHUNK, 3 * reference.EXACT_CHUNK + 17):
        a = torch.full((2, k), 255)
        b = torch.full((2, k), 127)
        b[1] = -127
        a[:, k // 2] = 254
        expected = a @ b.t()
        assert torch.equal(reference.chunked_matmul(a.int(), b.to(torch.int8)).long(), expected)
    assert 255 * 127 * reference.EXACT_CHUNK < 2**24


@pytest.mark.parametrize("device", DEVICES)
def test_reference_matmul_where_it_runs(device: str) -> None:
    a, b = integers((33, 1030), 0, 255, 0), integers((17, 1030), -127, 127, 1)
    got = reference.integer_matmul(a.int().to(device), b.to(torch.int8).to(device))
    assert torch.equal(got.cpu().long(), a @ b.t())


# --- every backend against exact arithmetic -------------------------------------------------------------------------


@place(LINEAR_STATIC)
@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 5), max_size=2), st.integers(1, 70), st.integers(1, 50), st.sampled_from(DTYPES),
    st.sampled_from(ZERO_POINTS), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 1 << 30),
)  # fmt: skip
def test_linear_static(
    backend: Backend, device: str, lead: list[int], k: int, n: int, dtype: torch.dtype, zero_point: int, biased: bool,
    balanced: bool, odd_strides: bool, seed: int,
) -> None:  # fmt: skip
    geometry = Geometry((n, k))
    case = static_case((*lead, k), geometry, dtype, zero_point, biased, balanced, seed)
    if odd_strides and lead:
        case.x = awkward(case.x)
    case.check(case.run(backend, LINEAR_STATIC, device))


@place(LINEAR_DYNAMIC)
@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 5), max_size=2), st.integers(2, 70), st.integers(1, 50), st.sampled_from(DTYPES),
    st.booleans(), st.booleans(), st.booleans(), st.integers(0, 1 << 30),
)  # fmt: skip
def test_linear_dynamic(
    backend: Backend, device: str, lead: list[int], k: int, n: int, dtype: torch.dtype, biased: bool, balanced: bool,
    odd_strides: bool, seed: int,
) -> None:  # fmt: skip
    case = dynamic_case((*lead, k), n, dtype, biased, balanced, seed)
    if odd_strides and lead:
        case.x = awkward(case.x)
    case.check(case.run(backend, LINEAR_DYNAMIC, device))


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Geometry, tuple[int, int]]:
    usual = draw(st.booleans())  # what diffusion models have; every backend takes these
    groups = 1 if usual else draw(st.sampled_from([1, 2, 3]))
    n, c = groups * draw(st.integers(1, 12)), draw(st.integers(1, 12))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 1), (2, 2)]))
    stride = draw(st.sampled_from([(1, 1), (2, 2)] if usual else [(1, 1), (2, 2), (1, 2)]))
    padding = tuple((k - 1) // 2 for k in kernel) if usual else draw(st.sampled_from([(0, 0), (1, 1), (2, 0)]))
    dilation = (1, 1) if usual else draw(st.sampled_from([(1, 1), (2, 2), (1, 2)]))
    geometry = Geometry((n, c, *kernel), stride, padding, dilation, groups)
    size = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    assume(min(geometry.output_size(*size)) >= 1)
    return geometry, size


@place(CONV2D_STATIC)
@settings(max_examples=50)
@given(
    geometries(), st.sampled_from([1, 2, 9]), st.sampled_from(DTYPES), st.sampled_from(ZERO_POINTS), st.booleans(),
    st.booleans(), st.sampled_from(["contiguous", "channels_last", "awkward"]), st.integers(0, 1 << 30),
)  # fmt: skip
def test_conv2d_static(
    backend: Backend, device: str, layer: tuple[Geometry, tuple[int, int]], batch: int, dtype: torch.dtype,
    zero_point: int, biased: bool, balanced: bool, layout: str, seed: int,
) -> None:  # fmt: skip
    geometry, size = layer
    if backend.refuse(CONV2D_STATIC, torch.device(device), geometry) is not None:
        return
    shape = (batch, geometry.shape[1] * geometry.groups, *size)
    case = static_case(shape, geometry, dtype, zero_point, biased, balanced, seed)
    if layout == "channels_last":
        case.x = case.x.contiguous(memory_format=torch.channels_last)
    elif layout == "awkward":
        case.x = awkward(case.x)
    case.check(case.run(backend, CONV2D_STATIC, device))


CONVOLUTIONS = {
    "1x1 on one pixel": (Geometry((13, 7, 1, 1)), (1, 7, 1, 1)),
    "3x3 on one pixel": (Geometry((13, 7, 3, 3), padding=(1, 1)), (9, 7, 1, 1)),
    "stride 2, odd size": (Geometry((33, 17, 3, 3), (2, 2), (1, 1)), (9, 17, 9, 7)),
    "dilation 2": (Geometry((8, 8, 3, 3), (1, 1), (2, 2), (2, 2)), (1, 8, 6, 5)),
    "groups 3": (Geometry((9, 5, 3, 3), padding=(1, 1), groups=3), (2, 15, 5, 5)),
    "depthwise": (Geometry((11, 1, 3, 3), padding=(1, 1), groups=11), (2, 11, 5, 5)),
    # cases that oneDNN got wrong: it must refuse them, or be right
    "tall, one column left": (Geometry((16, 8, 3, 3), (2, 2), (1, 1)), (2, 8, 20, 2)),
    "one column, no padding": (Geometry((48, 32, 3, 3), (2, 2)), (2, 32, 11, 3)),
    "unequal strides": (Geometry((4, 7, 2, 2), (1, 2)), (1, 7, 6, 2)),
    "padding as wide as the kernel": (Geometry((4, 1, 2, 2), padding=(2, 2)), (9, 1, 8, 19)),
    "window in the padding": (Geometry((4, 70, 2, 2), padding=(1, 1), dilation=(2, 2)), (2, 70, 8, 1)),
    "patches": (Geometry((16, 32, 4, 4), (4, 4)), (1, 32, 16, 16)),
    "48 channels a group": (Geometry((96, 20, 5, 5), groups=2), (1, 20 * 2, 6, 9)),
    "16 x 32 channels": (Geometry((32, 16, 3, 3), padding=(1, 1)), (2, 16, 8, 8)),
}


EVERYWHERE = [
    (operation, backend, device)
    for device in DEVICES
    for operation in (LINEAR_STATIC, LINEAR_DYNAMIC, CONV2D_STATIC)
    for backend in able(operation, device, Geometry((16, 16, 3, 3)) if operation == CONV2D_STATIC else None)
    if backend.name not in INEXACT
]
everywhere = pytest.mark.parametrize(
    ("operation", "backend", "device"), EVERYWHERE, ids=[f"{o}-{b.name}-{d}" for o, b, d in EVERYWHERE]
)
NAMED = [
    (name, backend, device)
    for name, (geometry, _) in CONVOLUTIONS.items()
    for device in DEVICES
    for backend in able(CONV2D_STATIC, device, geometry)
    if backend.name not in INEXACT
]


@pytest.mark.parametrize(("name", "backend", "device"), NAMED, ids=[f"{n}-{b.name}-{d}" for n, b, d in NAMED])
@pytest.mark.parametrize("zero_point", [0, 255])
def test_convolutions_worth_a_name(backend: Backend, device: str, name: str, zero_point: int) -> None:
    geometry, shape = CONVOLUTIONS[name]
    for dtype in DTYPES:
        case = static_case(shape, geometry, dtype, zero_point, True, True, 5)
        case.check(case.run(backend, CONV2D_STATIC, device))


def test_what_onednn_and_int_mm_leave_to_others() -> None:
    refused = {name: onednn.unsafe(geometry) for name, (geometry, _) in CONVOLUTIONS.items()}
    assert {name: reason for name, reason in refused.items() if reason is not None} == {
        "dilation 2": "dilation",
        "groups 3": "grouped convolution",
        "depthwise": "grouped convolution",
        "unequal strides": "stride 1 x 2",
        "padding as wide as the kernel": "padding as wide as the kernel",
        "window in the padding": "dilation",
        "patches": "stride 4 x 4",
        "48 channels a group": "grouped convolution",
    }
    grouped = {name for name, (geometry, _) in CONVOLUTIONS.items() if geometry.groups > 1}
    able_to = {name for name, backend, device in NAMED if backend.name == "int_mm" and device == "cpu"}
    assert able_to == set(CONVOLUTIONS) - grouped


# --- every backend against the reference on inputs off the grid -----------------------------------------------------


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_on_random_input(backend: Backend, device: str, dtype: torch.dtype, operation: str) -> None:
    g = torch.Generator().manual_seed(3)
    conv = operation == CONV2D_STATIC
    for seed, (m, k, n) in enumerate([(1, 5, 3), (17, 64, 48), (9, 33, 65), (130, 320, 96)]):
        geometry = Geometry((n, k, 3, 3), padding=(1, 1)) if conv else Geometry((n, k))
        x = torch.randn(*((m % 10, k, 5, 3) if conv else (m, k)), generator=g)
        if conv and m % 10 == 0:
            x = torch.randn(1, k, 9, 9, generator=g)
        x = (3 * x + 0.5).to(dtype)  # beyond the grid on both sides
        codes = integers(geometry.shape, -127, 127, seed).to(torch.int8)
        scale = torch.rand(n, generator=g) * 0.01 + 0.001
        bias = torch.randn(n, generator=g).to(dtype)
        inverse = torch.rand(k, generator=g) + 0.5
        grid = StaticInput(torch.tensor([0.031]), torch.tensor([99], dtype=torch.int32), inverse)
        case = Case(x, codes, scale, bias, grid, inverse, geometry, torch.empty(0), torch.empty(0))
        truth = case.run(BACKENDS[-1], operation, device)
        got = case.run(backend, operation, device)
        assert got.dtype == truth.dtype == dtype and got.shape == truth.shape
        spread = float(truth.float().std())
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[dtype]
        torch.testing.assert_close(got, truth, rtol=tolerance, atol=tolerance * spread)
        # the float layer itself is near as well: 8 bits of a clipped input
        weight = dequantize_weight(codes, scale)
        seen = x.float() * (inverse[:, None, None] if conv else inverse)
        if operation != LINEAR_DYNAMIC:
            seen = seen.clamp(-99 * 0.031, 156 * 0.031)
        plain = F.conv2d(seen, weight, bias.float(), padding=1) if conv else F.linear(seen, weight, bias.float())
        assert float((truth.float() - plain).norm() / plain.norm()) < 0.03


@everywhere
def test_the_input_is_left_alone(operation: str, backend: Backend, device: str) -> None:
    case = {
        LINEAR_STATIC: lambda: static_case((5, 6), Geometry((4, 6)), torch.float32, 3, True, True, 0),
        LINEAR_DYNAMIC: lambda: dynamic_case((5, 6), 4, torch.float32, True, True, 0),
        CONV2D_STATIC: lambda: static_case((2, 6, 4, 4), Geometry((4, 6, 3, 3)), torch.float32, 3, True, True, 0),
    }[operation]()
    kept = {name: v.clone() for name, v in vars(case).items() if isinstance(v, Tensor)}
    case.run(backend, operation, device)
    for name, value in kept.items():
        assert torch.equal(getattr(case, name), value), name


@place(LINEAR_DYNAMIC)
def test_constant_and_zero_rows(backend: Backend, device: str) -> None:
    """A row without span has no scale of its own and must still come out right."""
    geometry = Geometry((3, 4))
    x = torch.tensor([[0.0] * 4, [2.5] * 4, [-1.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    codes = integers((3, 4), -127, 127, 0)
    scale = torch.tensor([0.5, 0.25, 0.125])
    expected = x.double() @ (codes.double() * scale.double().unsqueeze(1)).t()
    empty = torch.empty(0)
    case = Case(x, codes.to(torch.int8), scale, None, None, None, geometry, expected, empty)
    torch.testing.assert_close(case.run(backend, LINEAR_DYNAMIC, device).double(), expected, rtol=1e-5, atol=1e-3)


def test_int_mm_in_slices_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = next(b for b in BACKENDS if b.name == "int_mm")
    geometry = Geometry((10, 6, 3, 3), padding=(1, 1))
    monkeypatch.setattr(int_mm, "PATCH_BYTES", 2 * 5 * 4 * 56)  # two images of the nine at a time
    case = static_case((9, 6, 5, 4), geometry, torch.float32, 200, True, True, 1)
    case.check(case.run(backend, CONV2D_STATIC, "cpu"))


# --- geometry and table ---------------------------------------------------------------------------------------------


@given(geometries())
def test_output_size(layer: tuple[Geometry, tuple[int, int]]) -> None:
    geometry, size = layer
    n, c, *kernel = geometry.shape
    conv = nn.Conv2d(
        c * geometry.groups, n, kernel, geometry.stride, geometry.padding, geometry.dilation, geometry.groups,
        device="meta",
    )  # fmt: skip
    assert geometry_of(conv) == geometry
    y = conv(torch.empty(1, c * geometry.groups, *size, device="meta"))
    assert geometry.output_size(*size) == tuple(y.shape[2:])


def test_geometry_of_what_no_kernel_knows() -> None:
    assert geometry_of(nn.Linear(3, 5)) == Geometry((5, 3))
    assert geometry_of(nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular")) == "padding mode circular"
    assert geometry_of(nn.Conv2d(3, 5, 3, padding="same")) == "padding 'same'"
    assert not Geometry((5, 3)).is_conv and Geometry((5, 3, 1, 1)).is_conv


@pytest.mark.parametrize("exact", [True, False])
@given(st.integers(17, 40), st.integers(1, 5), st.integers(1, 9), st.booleans(), st.integers(0, 1 << 30))
@settings(max_examples=25)
def test_the_int8_product_is_exact_either_way(exact: bool, m: int, n: int, k: int, ends: bool, seed: int) -> None:
    """Whole where this processor adds exactly, and in two parts, which every processor adds exactly."""
    if exact and not int8_product._try():
        exact = False
    q, codes = integers((m, 8 * k), -128, 127, seed), integers((8 * n, 8 * k), -128, 127, seed + 1)
    if ends:  # as large as they can be, in runs of one sign
        q, codes = (torch.where(t > -100, 127, -128) for t in (q, codes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_product, "_adds_exactly", lambda: exact)
        got = int8_product.int8_product(q.to(torch.int8), codes.to(torch.int8))
    assert got.dtype == torch.int32 and torch.equal(got.long(), q @ codes.t())


PLAYED = """
import torch
from tfmq.kernels import onednn, table
from tfmq.geometry import Geometry

geometry, cpu = Geometry((32, 64)), torch.device("cpu")
print(table.pick(table.LINEAR_STATIC, cpu, geometry).name, onednn.missing(), onednn.fast_bfloat16())
"""


@pytest.mark.parametrize("bound", ["AVX2", "SSE41"])
def test_onednn_is_asked_what_it_may_use(bound: str) -> None:
    """The processor may have VNNI and oneDNN be kept from it: then its sums saturate."""
    found = []
    for more in ({}, {"ONEDNN_MAX_CPU_ISA": bound}):
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "", "PYTHONPATH": str(ROOT), **more}
        command = [sys.executable, "-c", PLAYED]
        found.append(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    own, bounded = found
    assert bounded.startswith("int_mm ") and bounded.rstrip().endswith(" False")
    if own.startswith("onednn None"):
        assert "no use of VNNI" in bounded


def test_pick_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from tfmq.kernels import table

    def backend(name: str, reason: str | None) -> Backend:
        return Backend(name, reference, lambda *_: reason, 1.0)

    monkeypatch.setattr(table, "BACKENDS", (backend("a", "broken"), backend("b", None), backend("c", None)))
    geometry = Geometry((4321, 5))  # `pick` remembers: a shape of no other test
    try:
        assert pick(LINEAR_STATIC, torch.device("cpu"), geometry).name == "b"
        assert refusals(LINEAR_STATIC, torch.device("cpu"), geometry) == {"a": "broken"}
    finally:
        pick.cache_clear()


def test_the_last_backend_runs_everything() -> None:
    grouped = Geometry((6, 1, 3, 3), groups=6)
    for device in ("cpu", "cuda", "mps", "meta"):
        for operation in (LINEAR_STATIC, LINEAR_DYNAMIC, CONV2D_STATIC):
            assert BACKENDS[-1].refuse(operation, torch.device(device), grouped) is None
    names = {b.name: b for b in BACKENDS}
    assert names["onednn"].refuse(LINEAR_STATIC, torch.device("cuda"), grouped) == "only on CPUs"
    assert names["int_mm"].refuse(CONV2D_STATIC, torch.device("cpu"), grouped) == "no grouped convolution"
    assert "mps" in (names["int_mm"].refuse(LINEAR_STATIC, torch.device("mps"), Geometry((4, 4))) or "")
    assert pick(CONV2D_STATIC, torch.device("cpu"), grouped).name != "int_mm"
