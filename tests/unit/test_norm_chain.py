"""GroupNorm, SiLU and a quantized convolution in one make what they make one after another."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfmq.formats import int4
from tfmq.formats.affine import affine_grid
from tfmq.geometry import Geometry, Norm, StaticInput
from tfmq.kernels import int_mm, onednn, reference
from tfmq.kernels.table import BACKENDS, CONV2D_STATIC, CONV2D_STATIC_NORMED, pick
from tfmq.runtime import norm_silu_conv
from tfmq.runtime.leaf import QuantConv2d
from tfmq.runtime.run_state import RunState
from tfmq.scheme import NONE, STATIC, Scheme
from tfmq.state import LayerState
from tfmq.timeline import Partition, TimeAxis

pytestmark = pytest.mark.rounding

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_onednn = pytest.mark.skipif(onednn.missing() is not None, reason=f"no oneDNN here: {onednn.missing()}")


def image(shape: tuple[int, ...], dtype: torch.dtype, last: bool, seed: int = 0) -> Tensor:
    """A mean far from zero: no square of it may be subtracted."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 30).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def norm_of(channels: int, groups: int, dtype: torch.dtype, seed: int = 1) -> Norm:
    g = torch.Generator().manual_seed(seed)
    return Norm(
        groups, torch.randn(channels, generator=g).to(dtype), torch.randn(channels, generator=g).to(dtype), 1e-5
    )


def exact(x: Tensor, norm: Norm) -> Tensor:
    return F.silu(F.group_norm(x.double(), norm.groups, norm.weight.double(), norm.bias.double(), norm.eps))


# --- the operation --------------------------------------------------------------------------------------------------

GEOMETRIES = [
    Geometry((7, 12, 3, 3), padding=(1, 1)),
    Geometry((5, 12, 3, 3), (2, 2), (1, 1)),
    Geometry((5, 12, 3, 3)),
    Geometry((9, 12, 1, 1)),
    Geometry((4, 12, 3, 5), padding=(1, 2)),
]


@needs_onednn
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_codes_are_those_of_the_norm(geometry: Geometry, dtype: torch.dtype) -> None:
    """The codes differ by one at most, where the value is near the middle between two, and so does the sum."""
    codes = torch.randint(-127, 128, geometry.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    grids = [
        StaticInput(torch.tensor([0.031]), torch.tensor([30], dtype=torch.int32), inverse)
        for inverse in (None, torch.rand(12, generator=torch.Generator().manual_seed(4)) + 0.5)
    ]
    bias = torch.randn(geometry.shape[0]).to(dtype)
    prepared = onednn.prepare(codes, torch.full((geometry.shape[0],), 0.01), geometry)
    sizes = [(1, 7, 9), (3, 5, 6), (2, 33, 35)]
    for (b, h, w), groups, last, grid in product(sizes, (1, 3, 12), (False, True), grids):
        x, norm = image((b, 12, h, w), dtype, last), norm_of(12, groups, dtype)
        y = onednn.conv2d_static_normed(x, prepared, grid, bias, norm)
        value = exact(x, norm).float()
        truth = reference.conv2d_static(value, reference.prepare(codes, prepared.scale, geometry), grid, bias.float())
        assert y.dtype == dtype and y.shape == truth.shape
        error = float((y.double() - truth.double()).norm() / truth.double().norm())
        # Torch's norm of a large image, or of one that is not channels last, is rounded to x's dtype.
        assert error < {torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 5e-3}[dtype]


@needs_onednn
@pytest.mark.parametrize("shape", [(2, 12, 31, 33), (2, 12, 1, 1), (3, 12, 1, 7), (2, 12, 40, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gain_and_shift(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for groups in (1, 4, 12):
        x, norm = image(shape, dtype, True), norm_of(12, groups, dtype)
        gain, shift = onednn._gain_and_shift(x, norm)
        assert gain.dtype == shift.dtype == torch.float32  # whatever x is
        found = F.silu(x.double() * gain[..., None, None].double() + shift[..., None, None].double())
        torch.testing.assert_close(found, exact(x, norm), rtol=1e-3, atol=1e-3)


@needs_onednn
def test_a_small_image_is_not_rounded_in_between() -> None:
    """The codes of a bfloat16 input are those of a norm in float64, but for what is near a tie."""
    geometry = Geometry((64, 64, 1, 1))
    codes = (torch.eye(64) * 64).to(torch.int8)[..., None, None]
    prepared = onednn.prepare(codes, torch.full((64,), 1 / 64), geometry)
    x, norm = image((2, 64, 9, 8), torch.bfloat16, True), norm_of(64, 8, torch.bfloat16)
    grid = StaticInput(torch.tensor([2.0**-5]), torch.tensor([30], dtype=torch.int32), None)
    y = onednn.conv2d_static_normed(x, prepared, grid, None, norm)  # the codes themselves, times a power of two
    want = (exact(x, norm) * 32).round().clamp(-30, 225)
    off = (y.double() * 32 - want).abs()
    assert float(off.max()) <= 1 and float((off > 0).double().mean()) < 0.002
    apart = onednn.conv2d_static(F.silu(norm(x)), prepared, grid, None)
    assert float((apart.double() * 32 != want).double().mean()) > 0.01


@needs_onednn
def test_a_single_column() -> None:
    geometry = Geometry((5, 12, 3, 3), (2, 2), (1, 1))
    codes = torch.randint(-127, 128, geometry.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    prepared = onednn.prepare(codes, torch.full((5,), 0.01), geometry)
    grid = StaticInput(torch.tensor([0.031]), torch.tensor([30], dtype=torch.int32), None)
    for width in (1, 2):
        x, norm = image((2, 12, 6, width), torch.float32, True), norm_of(12, 3, torch.float32)
        y = onednn.conv2d_static_normed(x, prepared, grid, None, norm)
        value = exact(x, norm).float()
        truth = reference.conv2d_static(value, reference.prepare(codes, prepared.scale, geometry), grid, None)
        assert y.shape == truth.shape == (2, 5, 3, 1)
        assert float((y - truth).norm() / truth.norm()) < 2e-3


# --- the chain ------------------------------------------------------------------------------------------------------


def leaf_of(scheme: Scheme, branches: int = 1, channels: int = 16) -> QuantConv2d:
    g = torch.Generator().manual_seed(5)
    shape = (6, channels, 3, 3)
    clock = RunState(TimeAxis(0.0, 1000.0), Partition.uniform(4))
    high = torch.arange(4.0, 8.0)
    table: tuple = affine_grid(torch.full((4,), -0.3), high, scheme.activation_bits)
    if branches > 1:
        table = tuple(torch.stack([part, other]) for part, other in zip(table, affine_grid(-high, high), strict=True))
    if scheme.weight_bits == 4:
        weight = int4.pack(torch.randint(0, 16, (6, channels * 9), generator=g).to(torch.uint8))
        factor = torch.randint(1, 8, (6, channels * 9 // 16), generator=g).to(torch.uint8)
        four: dict = {"factor": factor, "zero": torch.full_like(factor, 8)}
    else:
        weight, four = torch.randint(-127, 128, shape, generator=g).to(torch.int8), {}
    scale = torch.rand(6, generator=g) * 0.01 + 0.001
    act = table if scheme.activation == STATIC else (None, None)
    state = LayerState("conv2d", scheme, shape, weight, scale, None, *act, **four)
    leaf = QuantConv2d(state, Geometry(shape, padding=(1, 1)), clock, torch.randn(6, generator=g))
    clock.set(torch.tensor([600.0]))
    return leaf


def chain(leaf: nn.Module, *between: nn.Module, head: tuple[nn.Module, ...] = (), channels: int = 16) -> nn.Sequential:
    norm = nn.GroupNorm(4, channels)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-1, 1)
    return nn.Sequential(*head, norm, nn.SiLU(), *between, leaf).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """What the fused operation was called with."""
    found: list[torch.Size] = []
    operation: Callable[..., Tensor] = onednn.conv2d_static_normed

    def watched(x: Tensor, *rest: object, **named: object) -> Tensor:
        found.append(x.shape)
        return operation(x, *rest, **named)

    monkeypatch.setattr(onednn, CONV2D_STATIC_NORMED, watched)
    return found


def close(found: Tensor, plain: Tensor) -> None:
    assert float((found - plain).norm() / plain.norm()) < 5e-3


EIGHT = Scheme(activation=STATIC)


@needs_onednn
@pytest.mark.parametrize("last", [False, True])
def test_it_is_taken(calls: list, last: bool) -> None:
    x = image((2, 16, 5, 6), torch.float32, last)
    for leaf, head, between, times in (
        (leaf_of(EIGHT), (), (), 1),
        (leaf_of(EIGHT), (), (nn.Dropout(0.5), nn.Identity()), 1),
        (leaf_of(EIGHT), (nn.Identity(), nn.Conv2d(16, 16, 1)), (), 1),
        (leaf_of(Scheme(4, activation=STATIC, group=16)), (), (), 1),
        (leaf_of(EIGHT, branches=2), (), (), 2),
    ):
        calls.clear()
        leaf.clock.at(CPU).branches = (0, 1)
        sequence = chain(leaf, *between, head=head)
        with torch.inference_mode():
            plain = sequence(x)
            assert not calls
            close(norm_silu_conv.run(sequence, x), plain)
        assert len(calls) == times


@needs_onednn
def test_two_in_one() -> None:
    both = nn.Sequential(*chain(leaf_of(EIGHT)), nn.Conv2d(6, 16, 1), *chain(leaf_of(EIGHT))).eval()
    x = image((2, 16, 5, 6), torch.float32, True)
    with torch.inference_mode():
        close(norm_silu_conv.run(both, x), both(x))


def test_everything_else_stays_as_it_is(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the chain is there, but somebody watches it or the layer cannot."""
    x = image((2, 16, 5, 6), torch.float32, False)

    def same(sequence: nn.Sequential, dtype: torch.dtype = torch.float32) -> None:
        with torch.inference_mode():
            plain = sequence(x.to(dtype))
            assert torch.equal(norm_silu_conv.run(sequence, x.to(dtype)), plain)
        assert not calls

    same(chain(nn.Conv2d(16, 6, 3)))
    same(nn.Sequential(nn.SiLU(), leaf_of(EIGHT)).eval())
    same(nn.Sequential(nn.GroupNorm(4, 16), nn.ReLU(), leaf_of(EIGHT)).eval())
    same(nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU()).eval())
    same(nn.Sequential(nn.GroupNorm(4, 16)).eval())
    same(nn.Sequential(nn.GroupNorm(4, 16, affine=False), nn.SiLU(), leaf_of(EIGHT)).eval())
    same(chain(leaf_of(EIGHT), nn.AvgPool2d(2)))
    same(chain(leaf_of(Scheme(activation=NONE))))
    same(chain(leaf_of(Scheme(activation=STATIC, activation_bits=6))))
    seen: list = []
    for which in range(3):
        sequence = chain(leaf_of(EIGHT))
        handle = sequence[which].register_forward_hook(lambda *_: seen.append(1))
        same(sequence)
        handle.remove()
        handle = sequence[which].register_forward_pre_hook(lambda *_: seen.append(1))
        same(sequence)
    assert len(seen) == 12
    for which in range(3):
        sequence = chain(leaf_of(EIGHT))
        own = sequence[which].forward
        sequence[which].forward = lambda x, own=own: own(x) * 1.5
        same(sequence)
    monkeypatch.setattr("tfmq.runtime.leaf.pick", lambda *_: next(b for b in BACKENDS if b.module is int_mm))
    same(chain(leaf_of(EIGHT)))


def test_a_dropout_that_drops_is_not_left_out() -> None:
    sequence = chain(leaf_of(EIGHT), nn.Dropout(1.0)).train()
    x = image((2, 16, 5, 6), torch.float32, False)
    with torch.inference_mode():
        assert torch.equal(norm_silu_conv.run(sequence, x), sequence(x))
        assert not torch.equal(sequence(x), sequence.eval()(x))


@needs_onednn
def test_empty_images_and_gradients(calls: list) -> None:
    sequence = chain(leaf_of(EIGHT))
    assert norm_silu_conv.run(sequence, torch.empty(0, 16, 5, 6)).shape == (0, 6, 5, 6)
    x = image((2, 16, 5, 6), torch.float32, True)
    close(norm_silu_conv.run(sequence, x).detach(), sequence(x).detach())  # the norm's weight has gradients here
    assert len(calls) == 1


@needs_onednn
def test_a_compiler_sees_the_plain_layers(calls: list) -> None:
    sequence = chain(leaf_of(EIGHT))
    x = image((2, 16, 5, 6), torch.float32, False)
    with torch.inference_mode():
        plain = sequence(x)  # prepares the weight
        compiled = torch.compile(lambda x: norm_silu_conv.run(sequence, x), backend="eager")
        close(compiled(x), plain)
    assert not calls


def test_backends_that_have_it() -> None:
    names = {backend.name for backend in BACKENDS if hasattr(backend.module, CONV2D_STATIC_NORMED)}
    assert names == {"onednn", "triton"}
    assert pick(CONV2D_STATIC, CPU, Geometry((8, 8, 3, 3))).name in {"onednn", "int_mm"}
