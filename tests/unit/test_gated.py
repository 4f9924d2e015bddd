"""GEGLU behind a quantized Linear: what a backend computes in one is what the two are one after the other."""

import pytest
import torch
from torch import Tensor

from tfmq.geometry import Geometry, StaticInput, geglu
from tfmq.kernels import onednn, reference
from tfmq.kernels.table import BACKENDS, LINEAR_STATIC, MULTIPLY_GATED, Backend

pytestmark = pytest.mark.rounding

CPU = torch.device("cpu")
GATING = [b for b in BACKENDS if hasattr(b.module, MULTIPLY_GATED)]
DTYPES = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def test_the_gate_is_the_second_half() -> None:
    y = torch.tensor([[2.0, 3.0, -1.0, 4.0]])
    gate = torch.special.ndtr(y[:, 2:].double()) * y[:, 2:]
    torch.testing.assert_close(geglu(y).double(), y[:, :2].double() * gate)


def operands(n: int, k: int, dtype: torch.dtype, biased: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(n + k)
    x = torch.randn(2, 9, k, generator=g).to(dtype)
    codes = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8)
    scale = torch.rand(n, generator=g) * 1e-3 + 1e-3
    return x, codes, scale, torch.randn(n, generator=g).to(dtype) if biased else None


@pytest.mark.parametrize("backend", GATING, ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), (6, 5), (130, 70), (640, 320)], ids=str)
@pytest.mark.parametrize("static", [True, False])
def test_parity(backend: Backend, dtype: torch.dtype, biased: bool, shape: tuple[int, int], static: bool) -> None:
    geometry = Geometry(shape)
    if (reason := backend.refuse(LINEAR_STATIC, CPU, geometry)) is not None:
        pytest.skip(f"{backend.name}: {reason}")
    x, codes, scale, bias = operands(*shape, dtype, biased)
    grid = StaticInput(torch.tensor([0.03]), torch.tensor([121], dtype=torch.int32), None)
    found = []
    for module in (reference, backend.module):
        weight = module.prepare(codes, scale, geometry)
        q = module.quantize_static(x, weight, grid) if static else module.quantize_dynamic(x, weight, None)
        found.append(getattr(module, MULTIPLY_GATED)(q, weight, bias))
    want, got = found
    assert got.dtype is dtype and got.shape == want.shape == (2, 9, shape[0] // 2)
    spread = float(want.float().std()) if want.numel() > 1 else 1.0
    torch.testing.assert_close(got.float(), want.float(), rtol=DTYPES[dtype], atol=DTYPES[dtype] * spread)


@pytest.mark.parametrize("shape", [(6, 5), (64, 32)], ids=str)
def test_a_weight_goes_from_one_order_to_the_other_and_back(shape: tuple[int, int]) -> None:
    if (reason := onednn.missing()) is not None:
        pytest.skip(reason)
    x, codes, scale, bias = operands(*shape, torch.float32, True)
    grid = StaticInput(torch.tensor([0.03]), torch.tensor([121], dtype=torch.int32), None)
    weight = onednn.prepare(codes, scale, Geometry(shape))
    q = onednn.quantize_static(x, weight, grid)
    plain = onednn.multiply(q, weight, bias)
    for _ in range(2):
        gated = onednn.multiply_gated(q, weight, bias)
        assert len(weight.packed) == 2 and torch.equal(onednn.restore(weight), codes)
        torch.testing.assert_close(gated, geglu(plain))
        assert torch.equal(onednn.multiply(q, weight, bias), plain)
        assert len(weight.packed) == 1 and torch.equal(onednn.restore(weight), codes)
