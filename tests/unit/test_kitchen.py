"""comfy_kitchen's int8 Linear with our shifts around it, by its plain torch on a CPU."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from devkit.paths import ROOT
from tfmq.formats.affine import affine_grid
from tfmq.geometry import Geometry, StaticInput
from tfmq.kernels import int_mm, kitchen, reference, trial

pytest.importorskip("comfy_kitchen.registry")
pytestmark = pytest.mark.rounding
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
N, K = 48, 320
GEOMETRY = Geometry((N, K))


@pytest.fixture(autouse=True)
def _a_product_as_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact, where torch's own saturates on this processor."""
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.double() @ b.double()).to(torch.int32))


def layer(dtype: torch.dtype, lopsided: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, codes, scale, bias, inverse balance. lopsided: x as behind a SiLU."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 55, K, generator=g) * 2
    x = F.silu(x * 2) if lopsided else x
    codes = torch.randint(-127, 128, (N, K), generator=g).to(torch.int8)
    scale, bias = torch.rand(N, generator=g) * 0.01 + 0.001, torch.randn(N, generator=g)
    return x.to(dtype), codes, scale, bias.to(dtype), torch.rand(K, generator=g) + 0.5


def error(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("lopsided", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_errs_no_more_than_the_reference(dtype: torch.dtype, biased: bool, balanced: bool, lopsided: bool) -> None:
    """Against the float layer: 254 steps of a row's span in place of 255, and a static grid of a row's own width."""
    x, codes, scale, bias, inverse = layer(dtype, lopsided)
    given = inverse if balanced else None
    seen = x.double() * (1.0 if given is None else given.double())
    truth = F.linear(seen, codes.double() * scale.double()[:, None], bias.double() if biased else None)
    grid = StaticInput(*(t.reshape(1) for t in affine_grid(seen.min(), seen.max())), given)
    ours, theirs = kitchen.prepare(codes, scale, GEOMETRY), reference.prepare(codes, scale, GEOMETRY)
    more = bias if biased else None
    for name, how in (("linear_static", grid), ("linear_dynamic", given)):
        y = getattr(kitchen, name)(x, ours, how, more)
        assert y.dtype == dtype and y.shape == truth.shape
        allowed = error(getattr(reference, name)(x, theirs, how, more), truth)
        # A second rounding to x's dtype where the row's shift or the bias is added behind.
        rounding = {torch.float32: 0.0, torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype]
        assert error(y, truth) <= 1.05 * allowed + rounding, name


def test_the_grid_is_the_one_that_is_described() -> None:
    """Values on a grid of 254 steps about the centre of the static grid come out exactly."""
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, (N, K), generator=g).to(torch.int8)
    steps = torch.randint(-127, 128, (5, K), generator=g)
    steps[:, 0], steps[:, 1] = 127, -127
    zero = 40
    x = (steps.double() + 127.5 - zero) * 2.0**-4  # all held by float32
    grid = StaticInput(torch.tensor([2.0**-4]), torch.tensor([zero], dtype=torch.int32), None)
    prepared = kitchen.prepare(codes, torch.full((N,), 2.0**-3), GEOMETRY)
    expected = F.linear(x, codes.double() * 2.0**-3)
    torch.testing.assert_close(
        kitchen.linear_static(x.float(), prepared, grid, None).double(), expected, rtol=1e-6, atol=1e-2
    )
    torch.testing.assert_close(
        kitchen.linear_dynamic(x.float(), prepared, None, None).double(), expected, rtol=1e-6, atol=1e-2
    )
    off = kitchen.linear_static(x.float(), prepared, grid._replace(zero_point=grid.zero_point + 1), None)
    assert float((off.double() - expected).abs().max()) > 0.1  # the test sees a centre half a step off


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_give_the_same_bits(rows: int, dtype: torch.dtype) -> None:
    x, codes, scale, bias, inverse = layer(dtype, True)
    x = x.view(-1, K)[:rows]
    prepared = kitchen.prepare(codes, scale, GEOMETRY)
    grid = StaticInput(torch.tensor([0.05]), torch.tensor([20], dtype=torch.int32), inverse)
    static = kitchen.quantize_static(x, prepared, grid)
    assert torch.equal(kitchen.multiply(static, prepared, bias), kitchen.linear_static(x, prepared, grid, bias))
    dynamic = kitchen.quantize_dynamic(x, prepared, inverse)
    assert torch.equal(kitchen.multiply(dynamic, prepared, bias), kitchen.linear_dynamic(x, prepared, inverse, bias))
    assert kitchen.view(prepared).data_ptr() == codes.data_ptr()


def test_constant_rows() -> None:
    x = torch.tensor([[0.0] * 16, [2.5] * 16, [-1.25] * 16])
    codes = torch.randint(-127, 128, (8, 16), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    prepared = kitchen.prepare(codes, torch.full((8,), 0.5), Geometry((8, 16)))
    y = kitchen.linear_dynamic(x, prepared, None, None)
    torch.testing.assert_close(y, F.linear(x, codes.float() * 0.5), rtol=1e-5, atol=1e-3)


def test_under_compile_torch_makes_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are no operations that a graph could hold."""
    x, codes, scale, bias, inverse = layer(torch.float32, False)
    prepared = kitchen.prepare(codes, scale, GEOMETRY)
    grid = StaticInput(torch.tensor([0.05]), torch.tensor([120], dtype=torch.int32), inverse)
    plain = int_mm.prepare(codes, scale, GEOMETRY)
    expected = int_mm.linear_static(x, plain, grid, bias), int_mm.linear_dynamic(x, plain, inverse, bias)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return kitchen.linear_static(x, prepared, grid, bias), kitchen.linear_dynamic(x, prepared, inverse, bias)

    found = torch.compile(both, backend="eager", fullgraph=True)(x)
    assert all(torch.equal(y, e) for y, e in zip(found, expected, strict=True))


def test_a_trial_passes_it_and_sees_a_wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(trial, "_found", {})
    assert trial.fault("kitchen", kitchen, cpu, tolerance=kitchen.TOLERANCE) is None
    right = kitchen._run
    monkeypatch.setattr(kitchen, "_run", lambda *a: right(*a) * 1.05)
    monkeypatch.setattr(trial, "_found", {})
    assert "computes wrongly" in trial.fault("kitchen", kitchen, cpu, tolerance=kitchen.TOLERANCE)


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ({"available": False, "disabled": False, "unavailable_reason": "no CUDA", "capabilities": []}, "no CUDA"),
        ({"available": True, "disabled": True, "unavailable_reason": None, "capabilities": ["int8_linear"]}, "CUDA 13"),
        ({"available": True, "disabled": False, "unavailable_reason": None, "capabilities": []}, "no int8 Linear"),
        ({"available": True, "disabled": False, "unavailable_reason": None, "capabilities": ["int8_linear"]}, None),
        (None, "cannot be used"),
    ],
)
def test_reasons(monkeypatch: pytest.MonkeyPatch, found: dict | None, word: str | None) -> None:
    module = sys.modules["comfy_kitchen.registry"]  # the package has an object of that name
    monkeypatch.setattr(module, "registry", SimpleNamespace(list_backends=lambda: {"cuda": found} if found else {}))
    kitchen.unusable.cache_clear()
    said = kitchen.unusable()
    kitchen.unusable.cache_clear()
    assert said is None if word is None else word in (said or "")


def test_the_pack_runs_without_it() -> None:
    program = (
        "import sys; sys.modules['comfy_kitchen'] = None; sys.modules['triton'] = None\n"
        "import torch\n"
        "from tfmq.kernels import kitchen, table\n"
        "torch.cuda.get_device_capability = lambda *_: (8, 9)\n"
        "torch.cuda.get_device_name = lambda *_: 'NVIDIA GeForce RTX 4090'\n"
        "print(kitchen.missing(torch.device('cuda')))\n"
        "print(table.pick(table.LINEAR_STATIC, torch.device('cuda'), table.Geometry((1280, 1280))).name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["comfy_kitchen is not installed", "float_product"], done.stderr
