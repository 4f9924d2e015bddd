"""The way out for GPUs without a fast integer product: Linear layers in float, from integer codes."""

import pytest
import torch
from torch.nn import functional as F

from tfmq.formats.affine import affine_grid
from tfmq.formats.hadamard import rotate
from tfmq.geometry import Geometry, StaticInput
from tfmq.kernels import float_product, table
from tfmq.runtime.leaf import QuantLinear
from tfmq.runtime.run_state import RunState
from tfmq.scheme import DYNAMIC, STATIC, Scheme
from tfmq.state import LayerState
from tfmq.timeline import Partition, TimeAxis

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
GEOMETRY = Geometry((24, 48))


def layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, GEOMETRY.shape, generator=g).to(torch.int8), torch.rand(24, generator=g) * 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_it_is_the_float_layer_of_the_codes(dtype: torch.dtype, biased: bool, balanced: bool) -> None:
    g = torch.Generator().manual_seed(1)
    codes, scale = layer()
    inverse = torch.rand(48, generator=g) + 0.5 if balanced else None
    bias = torch.randn(24, generator=g) if biased else None
    x = torch.randn(3, 5, 48, generator=g).to(dtype)
    # a range that an integer kernel would clip to
    grid = StaticInput(torch.tensor([1e-3]), torch.tensor([3], dtype=torch.int32), inverse)
    prepared = float_product.prepare(codes, scale, GEOMETRY)
    weight = codes.float() * scale[:, None] * (1.0 if inverse is None else inverse)
    expected = F.linear(x.float(), weight, bias)
    results = [
        float_product.linear_static(x, prepared, grid, bias),
        float_product.linear_dynamic(x, prepared, inverse, bias),
        float_product.multiply(float_product.quantize_static(x, prepared, grid), prepared, bias),
        float_product.multiply(float_product.quantize_dynamic(x, prepared, inverse), prepared, bias),
    ]
    for y in results:
        assert y.dtype == dtype and y.shape == expected.shape
        torch.testing.assert_close(y.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert torch.equal(y, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(24, 48), (4, 16, 3, 3)])
def test_a_weight_is_rounded_once(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """By both ways: three passes, and the one of a GPU, which writes the float type from its registers."""
    g = torch.Generator().manual_seed(2)
    codes = torch.randint(-127, 128, shape, generator=g).to(torch.int8)
    if len(shape) == 4:
        codes = codes.contiguous(memory_format=torch.channels_last)
    scale, columns = torch.rand(shape[0], generator=g) * 1e-4, torch.rand(shape[1:], generator=g) + 0.5
    scaled = codes.float() * scale.view(-1, *[1] * (len(shape) - 1))
    for given, expected in ((None, scaled), (columns, scaled * columns)):
        y = float_product.decode(codes, scale, given, dtype)
        assert torch.equal(y, expected.to(dtype)) and y.stride() == codes.stride()
        out = torch.empty_like(codes, dtype=dtype)
        per = scale.view(-1, *[1] * (len(shape) - 1))
        one = torch.mul(codes, per, out=out) if given is None else torch.mul(torch.mul(codes, per), given, out=out)
        assert torch.equal(one, y)


def test_the_codes_lie_in_memory_once() -> None:
    codes, scale = layer()
    prepared = float_product.prepare(codes, scale, GEOMETRY)
    assert float_product.view(prepared).data_ptr() == codes.data_ptr()


@pytest.mark.parametrize("activation", [STATIC, DYNAMIC])
def test_a_rotated_leaf_multiplies_in_its_own_type(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the product would take longer than the float16 layer."""
    backend = next(b for b in table.BACKENDS if b.module is float_product)
    monkeypatch.setattr("tfmq.runtime.leaf.pick", lambda *_: backend)
    seen: list[torch.dtype] = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(x.dtype) or linear(x, *rest))
    codes, scale = layer()
    grids = affine_grid(torch.full((4,), -3.0), torch.full((4,), 3.0)) if activation == STATIC else (None, None)
    scheme = Scheme(activation=activation, rotation=16)
    state = LayerState("linear", scheme, GEOMETRY.shape, codes, scale, None, *grids)
    leaf = QuantLinear(state, GEOMETRY, RunState(TimeAxis(0.0, 1000.0), Partition.uniform(4)))
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(3)).half()
    y = leaf(x)
    assert seen == [torch.float16] and y.dtype == torch.float16
    expected = linear(rotate(x.float(), 16), codes.float() * scale[:, None])
    torch.testing.assert_close(y.float(), expected, rtol=5e-3, atol=5e-3)
