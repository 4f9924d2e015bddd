"""The way out for GPUs without a fast integer convolution: float, from integer weights."""

import pytest
import torch
from torch.nn import functional as F

from tfmq.kernels import float_conv, int_mm, table, triton_backend
from tfmq.kernels.geometry import Geometry, StaticInput
from tfmq.kernels.table import CONV2D_STATIC, LINEAR_STATIC

pytestmark = pytest.mark.rounding

CONVOLUTION = Geometry((6, 5, 3, 3), padding=(1, 1))
GPU = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_float_layer_of_the_codes(dtype: torch.dtype, groups: int, biased: bool) -> None:
    g = torch.Generator().manual_seed(0)
    geometry = Geometry((6, 4, 3, 3), (2, 1), (1, 2), (1, 2), groups)
    codes = torch.randint(-127, 128, geometry.shape, generator=g).to(torch.int8)
    scale, inverse = torch.rand(6, generator=g) * 0.01, torch.rand(4 * groups, generator=g) + 0.5
    x = torch.randn(9, 4 * groups, 7, 6, generator=g).to(dtype)
    bias = torch.randn(6, generator=g) if biased else None
    # a range that an integer kernel would clip to
    grid = StaticInput(torch.tensor([1e-3]), torch.tensor([3], dtype=torch.int32), inverse)
    y = float_conv.conv2d_static(x, float_conv.prepare(codes, scale, geometry), grid, bias)
    weight = codes.float() * scale[:, None, None, None]
    more = (geometry.stride, geometry.padding, geometry.dilation, groups)
    expected = F.conv2d(x.float() * inverse[:, None, None], weight, bias, *more)
    assert y.dtype == dtype and y.shape == expected.shape
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
    plain = float_conv.conv2d_static(
        x, float_conv.prepare(codes, scale, geometry), grid._replace(inverse_balance=None), bias
    )
    torch.testing.assert_close(plain.float(), F.conv2d(x.float(), weight, bias, *more), rtol=tolerance, atol=tolerance)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A GPU of the capability in the list, as far as the table asks; Triton is there."""
    capability = [(7, 5)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability[0])
    monkeypatch.setattr(triton_backend, "unusable", lambda: None)
    for cached in (triton_backend.missing, table.pick):
        cached.cache_clear()
    yield capability
    for cached in (triton_backend.missing, table.pick):
        cached.cache_clear()


def test_what_runs_on_a_turing_card(gpu: list[tuple[int, int]]) -> None:
    one_by_one, strided = Geometry((6, 5, 1, 1)), Geometry((6, 5, 1, 1), (2, 2))
    assert table.pick(LINEAR_STATIC, GPU, Geometry((6, 5))).module is int_mm
    assert table.pick(CONV2D_STATIC, GPU, one_by_one).module is int_mm
    assert table.pick(CONV2D_STATIC, GPU, strided).module is int_mm
    assert table.pick(CONV2D_STATIC, GPU, CONVOLUTION).module is float_conv
    reasons = table.refusals(CONV2D_STATIC, GPU, CONVOLUTION)
    assert list(reasons) == ["onednn", "triton", "int_mm"]
    assert "8.0" in reasons["triton"] and "1 x 1" in reasons["int_mm"]


def test_what_runs_on_newer_cards(gpu: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu[0] = (8, 9)
    for operation, geometry in ((LINEAR_STATIC, Geometry((6, 5))), (CONV2D_STATIC, CONVOLUTION)):
        assert table.pick(operation, GPU, geometry).module is triton_backend
    grouped = Geometry((6, 5, 3, 3), groups=2)
    assert table.pick(CONV2D_STATIC, GPU, grouped).module is float_conv
    assert table.refusals(CONV2D_STATIC, GPU, grouped)["triton"] == "grouped convolution"
    # without Triton, and on an AMD card
    for name, patch in (("not installed", (triton_backend, "unusable", lambda: "Triton is not installed")),
                        ("AMD", (torch.version, "hip", "6.2"))):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(*patch)
            triton_backend.missing.cache_clear()
            table.pick.cache_clear()
            assert table.pick(CONV2D_STATIC, GPU, CONVOLUTION).module is float_conv
            assert table.pick(LINEAR_STATIC, GPU, Geometry((6, 5))).module is int_mm
            assert name in table.refusals(CONV2D_STATIC, GPU, CONVOLUTION)["triton"]
