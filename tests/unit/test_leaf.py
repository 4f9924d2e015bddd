"""The leaves: integers inside, ranges that follow the clock, copies, and no float weight on the way."""

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tfmq.runtime.leaf
from support.backends import each
from tfmq.formats.affine import affine_grid, channel_scale, per_channel, quantize_weight
from tfmq.geometry import Geometry, geglu, geometry_of
from tfmq.kernels import reference
from tfmq.kernels.table import BACKENDS, CONV2D_STATIC, LINEAR_DYNAMIC, LINEAR_STATIC, Backend, pick
from tfmq.runtime.fused import GATED
from tfmq.runtime.leaf import QuantConv2d, QuantLinear
from tfmq.runtime.packed_codes import PackedCodes
from tfmq.runtime.run_state import RunState
from tfmq.scheme import DYNAMIC, STATIC, Scheme
from tfmq.state import LayerState
from tfmq.timeline import Partition, TimeAxis

pytestmark = pytest.mark.rounding

CPU = torch.device("cpu")
OPERATIONS = [LINEAR_STATIC, LINEAR_DYNAMIC, CONV2D_STATIC]
Leaf = QuantLinear | QuantConv2d


@dataclass
class Made:
    leaf: Leaf
    module: nn.Linear | nn.Conv2d
    x: Tensor
    clock: RunState


def make(operation: str, *, balanced: bool = True, intervals: int = 4) -> Made:
    """A leaf from a random layer; interval i has the range -(i + 1) .. i + 1. The weight is larger than any input."""
    torch.manual_seed(0)
    conv = operation == CONV2D_STATIC
    module = nn.Conv2d(24, 20, 3, padding=1) if conv else nn.Linear(40, 48)
    x = torch.randn(1, 24, 5, 5) if conv else torch.randn(2, 5, 40)
    weight = module.weight.detach()
    balance = torch.rand(weight.shape[1]) + 0.5 if balanced else None
    w = weight if balance is None else weight * per_channel(balance, weight.dim(), 1)
    scale = channel_scale(w)
    high = torch.arange(1.0, intervals + 1)
    act = affine_grid(-high, high) if operation != LINEAR_DYNAMIC else (None, None)
    scheme = Scheme(activation=DYNAMIC if operation == LINEAR_DYNAMIC else STATIC, balanced=balanced)
    state = LayerState(
        "conv2d" if conv else "linear", scheme, tuple(w.shape), quantize_weight(w, scale), scale, balance, *act
    )
    clock = RunState(TimeAxis(0.0, 1000.0), Partition.uniform(intervals))
    geometry = geometry_of(module)
    assert isinstance(geometry, Geometry) and module.bias is not None
    leaf = (QuantConv2d if conv else QuantLinear)(state, geometry, clock, module.bias.detach().clone())
    return Made(leaf, module, x, clock)


def use(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    monkeypatch.setattr(tfmq.runtime.leaf, "pick", lambda *_: backend)


def plain(made: Made, x: Tensor, weight: Tensor) -> Tensor:
    bias = made.module.bias
    return F.conv2d(x, weight, bias, padding=1) if made.leaf.geometry.is_conv else F.linear(x, weight, bias)


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("balanced", [False, True])
def test_a_leaf_is_near_the_layer_it_replaces(operation: str, balanced: bool) -> None:
    made = make(operation, balanced=balanced)
    made.clock.set(torch.tensor([999.0]))
    x = 0.6 * made.x  # the balance may double it, and nothing shall clip
    with torch.no_grad():
        for weight, bound in ((made.leaf.dequantize(), 0.025), (made.module.weight, 0.035)):
            expected = plain(made, x, weight)
            assert float((made.leaf(x) - expected).norm() / expected.norm()) < bound
    step = made.leaf.weight_scale.max() * (made.leaf.inverse_balance.max() if balanced else 1)
    assert float((made.leaf.dequantize() - made.module.weight.detach()).abs().max()) <= float(step) * 0.501


@pytest.mark.parametrize("operation", [LINEAR_STATIC, CONV2D_STATIC])
def test_ranges_follow_the_clock(operation: str) -> None:
    """The range of interval i clips at i + 1."""
    made = make(operation, balanced=False)
    x = 10 * made.x
    weight = made.leaf.dequantize()
    seen = []
    for interval, t in ((3, 999.0), (0, 10.0), (2, 600.0), (1, 300.0)):
        made.clock.set(torch.tensor([t]))
        with torch.no_grad():
            y = made.leaf(x)
            expected = plain(made, x.clamp(-(interval + 1), interval + 1), weight)
        assert float((y - expected).norm() / expected.norm()) < 0.02
        seen.append(y)
    assert not torch.equal(seen[0], seen[1])


def test_a_dynamic_leaf_ignores_the_clock() -> None:
    made = make(LINEAR_DYNAMIC)
    out = []
    for t in (0.0, 999.0):
        made.clock.set(torch.tensor([t]))
        out.append(made.leaf(made.x))
    assert torch.equal(*out)


@each(OPERATIONS)
def test_an_empty_batch(monkeypatch: pytest.MonkeyPatch, operation: str, backend: Backend) -> None:
    made = make(operation)
    use(monkeypatch, backend)
    for dtype in (torch.float32, torch.bfloat16):
        y = made.leaf(made.x[:0].to(dtype))
        assert y.dtype == dtype and y.shape == made.module(made.x[:0]).shape
    if operation != CONV2D_STATIC:
        assert made.leaf(made.x[:, :0]).shape == (2, 0, 48)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_output_has_the_type_of_the_input(operation: str, dtype: torch.dtype) -> None:
    made = make(operation)
    with torch.inference_mode():
        assert made.leaf(made.x.to(dtype)).dtype == dtype


# --- no float copy of a weight ----------------------------------------------------------------------------------------


class FloatsAsLargeAsAWeight(TorchDispatchMode):
    """Records every op that returns a floating tensor with at least as many entries as the weight.

    No input or output of the layers here is that large, so a permuted, flattened or padded copy of the weight, in
    whatever float type, is all that can be found.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.numel = weight.numel()
        self.found: list[str] = []
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops += 1
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel() >= self.numel:
                self.found.append(f"{func} -> {value.dtype} {tuple(value.shape)}")
        return out


@each(OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_forward_pass_makes_no_float_weight(
    monkeypatch: pytest.MonkeyPatch, operation: str, backend: Backend, dtype: torch.dtype
) -> None:
    made = make(operation)
    use(monkeypatch, backend)
    x = made.x.to(dtype)
    assert max(x.numel(), made.leaf(x).numel()) < made.leaf.codes.numel()
    made.leaf._prepared = None
    for prepared in (False, True):  # the first call packs the weight
        assert (made.leaf._prepared is not None) == prepared
        with FloatsAsLargeAsAWeight(made.leaf.codes) as watch, torch.inference_mode():
            made.leaf(x)
        assert watch.ops > 3
        assert watch.found == []


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("how", ["dequantize", "bfloat16", "flattened", "permuted", "padded"])
def test_the_detector_sees_a_float_weight(operation: str, how: str) -> None:
    """Negative control: a layer that dequantizes."""
    made = make(operation)
    codes, x = made.leaf.codes, made.x
    with FloatsAsLargeAsAWeight(codes) as watch, torch.inference_mode():
        if how == "dequantize":
            plain(made, x, made.leaf.dequantize())
        elif how == "bfloat16":
            codes.to(torch.bfloat16)
        elif how == "flattened":
            codes.flatten().half()
        elif how == "permuted":
            codes.movedim(0, -1).contiguous().float()
        else:
            F.pad(codes, (0, 3)).float()
    assert watch.found


def test_the_detector_sees_the_float_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU the reference multiplies in float: exact, but with a float copy, which is no secret."""
    made = make(LINEAR_STATIC)
    use(monkeypatch, BACKENDS[-1])
    exact = made.leaf(made.x)
    monkeypatch.setattr(reference, "integer_matmul", reference.chunked_matmul)
    with FloatsAsLargeAsAWeight(made.leaf.codes) as watch:
        chunked = made.leaf(made.x)
    assert watch.found
    assert torch.equal(chunked, exact)


# --- copies and the packed weight -------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_carry_no_packed_weight(operation: str, way: str) -> None:
    made = make(operation)
    made.clock.set(torch.tensor([300.0]))
    expected = made.leaf(made.x)
    assert made.leaf._prepared is not None
    if way == "deepcopy":
        twin = copy.deepcopy(made.leaf)
        assert twin.clock is made.clock
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(made.leaf))
    else:
        buffer = io.BytesIO()
        torch.save(made.leaf, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert twin._prepared is None
    assert made.leaf._prepared is not None  # the original keeps its own
    assert twin.codes.data_ptr() != made.leaf.codes.data_ptr()
    assert torch.equal(twin(made.x), expected)


def test_a_copy_follows_the_clock_of_its_model() -> None:
    made = make(LINEAR_STATIC)
    twin = copy.deepcopy(made.leaf)
    for t in (10.0, 999.0):
        made.clock.set(torch.tensor([t]))
        assert torch.equal(twin(made.x), made.leaf(made.x))


def test_the_weight_is_prepared_once_per_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(LINEAR_STATIC)
    count = []
    use(monkeypatch, BACKENDS[-1])
    inner = reference.prepare
    monkeypatch.setattr(reference, "prepare", lambda *a: count.append(1) or inner(*a))
    for _ in range(3):
        first = made.leaf(made.x)
    assert len(count) == 1
    made.leaf.codes = -made.leaf.codes
    second = made.leaf(made.x)
    assert len(count) == 2
    torch.testing.assert_close(second - made.leaf.bias, -(first - made.leaf.bias))


def test_nothing_is_kept_of_a_weight_that_is_here_for_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(LINEAR_STATIC)
    use(monkeypatch, BACKENDS[-1])
    codes, bias = made.leaf.codes, made.leaf.bias
    kept = made.leaf(made.x)
    held = made.leaf._prepared
    assert held is not None
    assert torch.equal(made.leaf.compute(made.x, None, codes.clone(), bias), kept)
    assert made.leaf._prepared is held
    made.leaf.codes = -codes
    torch.testing.assert_close(made.leaf.compute(made.x, None, -codes, bias) - bias, -(kept - bias))
    assert made.leaf._prepared is held
    fresh, count = make(LINEAR_STATIC).leaf, []
    inner = reference.prepare
    monkeypatch.setattr(reference, "prepare", lambda *a: count.append(a[3]) or inner(*a))
    for _ in range(2):
        fresh.compute(made.x, None, codes.clone(), bias)
    assert fresh._prepared is None
    assert count[0] is count[1] and torch.equal(count[0], codes.sum(1).int())  # read once


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_copy_that_stays_is_prepared_once(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As dynamic loading keeps a weight on the device, until it needs the room for another."""
    made = make(operation)
    use(monkeypatch, BACKENDS[-1])
    leaf, count = made.leaf, []
    inner = reference.prepare
    monkeypatch.setattr(reference, "prepare", lambda *a: count.append(1) or inner(*a))

    def run(codes: Tensor, resident: object | None) -> Tensor:
        return leaf.compute(made.x, resident, codes, None).detach()

    first, again = leaf.codes.clone(), leaf.codes.clone()
    here, there = object(), object()
    y = [run(first, here) for _ in range(3)]
    assert len(count) == 1 and torch.equal(y[0], y[2])
    assert leaf._prepared[2].codes.data_ptr() == first.data_ptr()  # no memory but that of the copy
    assert torch.equal(run(first.clone(), None), y[0]) and len(count) == 2, "for one call"
    for _ in range(2):  # went, and came back to another place
        assert torch.equal(run(again, there), y[0])
    assert len(count) == 3 and leaf._prepared[2].codes.data_ptr() == again.data_ptr()


@pytest.mark.parametrize("operation", [LINEAR_STATIC, CONV2D_STATIC])
def test_nothing_is_kept_that_takes_memory(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(operation)
    use(monkeypatch, BACKENDS[-1])
    leaf, count = made.leaf, []
    inner = reference.prepare
    monkeypatch.setattr(reference, "prepare", lambda c, *a: count.append(1) or inner(c.clone(), *a))
    here, codes = object(), leaf.codes.clone()
    for _ in range(2):
        leaf.compute(made.x, here, codes, None)
    assert len(count) == 2 and leaf._prepared is None


@pytest.mark.parametrize("operation", [LINEAR_STATIC, CONV2D_STATIC])
def test_a_weight_that_a_kernel_holds_in_another_order_is_not_there_twice(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the triton backend does it: the codes become a view of what the kernel reads."""
    made = make(operation)
    codes = made.leaf.codes.clone()
    use(monkeypatch, BACKENDS[-1])
    before = made.leaf(made.x)
    other = make(operation).leaf
    inner = reference.prepare
    monkeypatch.setattr(reference, "prepare", lambda c, *a: inner(c.clone(), *a))
    monkeypatch.setattr(reference, "view", lambda ready: ready.codes, raising=False)
    other.clock = made.clock
    assert torch.equal(other(made.x), before)
    assert other.codes.data_ptr() == other._prepared[2].codes.data_ptr() and torch.equal(other.codes, codes)
    held = other._prepared[2]
    assert torch.equal(other(made.x), before) and other._prepared[2] is held


def test_the_state_dict_holds_weight_and_bias_alone() -> None:
    assert set(make(LINEAR_STATIC).leaf.state_dict()) == {"codes", "weight_scale", "bias"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_leaf_keeps_its_codes_once(operation: str) -> None:
    made = make(operation)
    codes = made.leaf.codes.clone()
    before = made.leaf(made.x)
    if pick(operation, CPU, made.leaf.geometry).name == "onednn":
        assert isinstance(made.leaf.codes, PackedCodes)
    assert torch.equal(made.leaf.codes, codes) and torch.equal(made.leaf(made.x), before)
    state = made.leaf.state_dict()
    assert torch.equal(state["codes"], codes)
    state["codes"] = -codes
    made.leaf.load_state_dict(state)
    assert torch.equal(made.leaf.codes, -codes)
    bias = made.leaf.bias.reshape(-1, 1, 1) if operation == CONV2D_STATIC else made.leaf.bias
    torch.testing.assert_close(made.leaf(made.x) - bias, -(before - bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_warm_leaf_compiles_into_one_graph(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph break and no host sync; the clock stays an input."""
    made = make(operation)
    use(monkeypatch, BACKENDS[-1])
    torch._dynamo.reset()
    with torch.no_grad():
        made.leaf(made.x)
        compiled = torch.compile(made.leaf, backend="eager", fullgraph=True)
        for t in (10.0, 999.0):
            made.clock.set(torch.tensor([t]))
            assert torch.equal(compiled(made.x), made.leaf(made.x))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_backend_here_is_right_under_compile(operation: str) -> None:
    made = make(operation)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(made.leaf, backend="eager")
        for t in (10.0, 999.0):
            made.clock.set(torch.tensor([t]))
            assert torch.equal(compiled(made.x), made.leaf(made.x))


@each([LINEAR_STATIC, LINEAR_DYNAMIC])
def test_a_gated_leaf(operation: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(operation)
    use(monkeypatch, backend)
    with torch.no_grad():
        want = geglu(made.leaf(made.x))
        torch.testing.assert_close(made.leaf(made.x, GATED), want, rtol=1e-5, atol=1e-5)
        assert made.leaf(made.x[:0], GATED).shape == (0, 5, 24)
        plain = made.leaf(made.x)
        torch._dynamo.reset()
        compiled = torch.compile(made.leaf, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(made.x, GATED), want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(compiled(made.x), plain, rtol=1e-5, atol=1e-5)
        if backend.name == "onednn":
            made.leaf(made.x, GATED)
            assert len(made.leaf._prepared[2].packed) == (2 if operation == LINEAR_STATIC else 1)
