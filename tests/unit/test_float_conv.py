"""The way out for GPUs without a fast integer convolution: float, from integer weights."""

import pytest
import torch
from torch.nn import functional as F

from tfmq.geometry import Geometry, StaticInput
from tfmq.kernels import float_conv

pytestmark = pytest.mark.rounding


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
