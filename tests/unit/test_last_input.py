"""Leaves that read one tensor quantize it once, and compute what each computes alone."""

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

import tfmq.runtime.leaf
from support.backends import able
from tfmq.formats.affine import affine_grid, channel_scale, quantize_weight
from tfmq.geometry import Codes, Geometry
from tfmq.kernels import reference
from tfmq.kernels.table import BACKENDS, LINEAR_DYNAMIC, LINEAR_STATIC, Backend
from tfmq.runtime.leaf import QuantConv2d, QuantLinear
from tfmq.runtime.run_state import RunState
from tfmq.runtime.shared_input import Reading, SharedInput
from tfmq.scheme import DYNAMIC, STATIC, Scheme
from tfmq.state import LayerState
from tfmq.timeline import Partition, TimeAxis

pytestmark = pytest.mark.rounding

CPU, K = torch.device("cpu"), 48
KINDS = {
    "static": Scheme(activation=STATIC),
    "dynamic": Scheme(activation=DYNAMIC),
    "static, 6 bits": Scheme(activation=STATIC, activation_bits=6, balanced=True),
    "static, balanced, rotated": Scheme(activation=STATIC, balanced=True, rotation=16),
    "dynamic, balanced": Scheme(activation=DYNAMIC, balanced=True),
    "dynamic, permuted": Scheme(activation=DYNAMIC, rotation=16, permuted=True),
}
USED = [b for b in able(LINEAR_STATIC) if hasattr(b.module, "quantize_static")]  # the others share no codes
backends = pytest.mark.parametrize("backend", USED, ids=lambda b: b.name)


def clock() -> RunState:
    return RunState(TimeAxis(0.0, 1000.0), Partition.uniform(4))


def leaf(scheme: Scheme, on: RunState, outputs: int, seed: int = 0) -> QuantLinear:
    """Weights by outputs and seed; what belongs to the input is the same in all of a scheme."""
    g, same = torch.Generator().manual_seed(seed + outputs), torch.Generator().manual_seed(99)
    weight = torch.randn(outputs, K, generator=g)
    scale = channel_scale(weight)
    balance = torch.rand(K, generator=same) + 0.5 if scheme.balanced else None
    high = torch.arange(1.0, 5.0)
    act = affine_grid(-high, high, scheme.activation_bits) if scheme.activation == STATIC else (None, None)
    permutations = torch.randperm(K, generator=same).to(torch.int16).unsqueeze(0) if scheme.permuted else None
    codes = quantize_weight(weight, scale)
    state = LayerState("linear", scheme, (outputs, K), codes, scale, balance, *act, permutations=permutations)
    return QuantLinear(state, Geometry((outputs, K)), on, torch.randn(outputs, generator=g))


def siblings(scheme: Scheme, count: int = 3) -> tuple[RunState, list[QuantLinear]]:
    on = clock()
    return on, [leaf(scheme, on, 24 + 5 * i) for i in range(count)]


def alone(leaves: list[QuantLinear]) -> list[QuantLinear]:
    """The same, each on a clock of its own that stands where theirs stands."""
    twins = [copy.deepcopy(one) for one in leaves]
    for twin in twins:
        twin.clock, twin.readers = clock(), 1
        twin.clock.index(CPU).copy_(leaves[0].clock.index(CPU))
    return twins


def tensor(seed: int = 0) -> Tensor:
    return torch.randn(2, 7, K, generator=torch.Generator().manual_seed(seed)) * 2


class Counted:
    """How often codes were made to keep (`halves`) and in one go with the product (`whole`)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        self.halves = self.whole = 0
        for name in ("quantize_static", "quantize_dynamic", LINEAR_STATIC, LINEAR_DYNAMIC):
            monkeypatch.setattr(module, name, self._watch(getattr(module, name), name))
        self._inside = False

    def _watch(self, function, name: str):
        def run(*args, **kwargs):
            if self._inside:  # the whole is made of halves
                return function(*args, **kwargs)
            self.halves += name.startswith("quantize")
            self.whole += name.startswith("linear")
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return run

    def since(self) -> tuple[int, int]:
        found = self.halves, self.whole
        self.halves = self.whole = 0
        return found


def use(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> Counted:
    monkeypatch.setattr(tfmq.runtime.leaf, "pick", lambda *_: backend)
    return Counted(monkeypatch, backend.module)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return use(monkeypatch, BACKENDS[-1])


@pytest.fixture(params=[False, True], ids=["normal", "inference"], autouse=True)
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.inference_mode(request.param), torch.no_grad():
        yield


# --- once, and the same -----------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("kind", KINDS)
def test_shared_codes_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, backend: Backend, kind: str) -> None:
    counted = use(monkeypatch, backend)
    on, leaves = siblings(KINDS[kind])
    on.set(torch.tensor([600.0]))
    twins = alone(leaves)
    every = torch.bfloat16, torch.float32, torch.float16
    for dtype in every[:1] if backend.name == "triton" else every:  # its interpreter is slow
        x = tensor().to(dtype)
        for one in leaves:
            one.readers = 1
        expected = [twin(x) for twin in twins]
        assert counted.since() == (0, 3)
        for call in range(2):
            found = [one(x) for one in leaves]
            assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(found, expected, strict=True))
            # The first call learns that they are siblings.
            assert counted.since() == ((1, 0) if call else (2, 1))


def test_many_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN multiplies what is alone block by block, as it is quantized."""
    backend = BACKENDS[0]
    use(monkeypatch, backend)
    monkeypatch.setattr(backend.module, "MIN_ROWS", 5)
    monkeypatch.setattr(backend.module, "BLOCK", 1)
    _, leaves = siblings(KINDS["dynamic, balanced"])
    x = torch.randn(3, 11, 2 * K)[..., ::2]
    expected = [twin(x) for twin in alone(leaves)]
    for _ in range(2):
        assert all(torch.equal(one(x), y) for one, y in zip(leaves, expected, strict=True))


def test_a_layer_without_siblings_keeps_nothing(counted: Counted) -> None:
    on = clock()
    one, other = leaf(KINDS["dynamic"], on, 24), leaf(KINDS["static"], on, 30)
    for seed in range(3):
        x = tensor(seed)
        one(x)
        other(x)
        one(tensor(seed))
        assert counted.since() == (0, 3)
        assert on.at(CPU).shared_input.codes is None


# --- what must not be shared ------------------------------------------------------------------------------------------


def warm(leaves: list[QuantLinear]) -> None:
    """They have learnt of each other, and codes are ready for all but the first."""
    x = tensor(55)
    for one in leaves:
        one(x)


@pytest.mark.parametrize("kind", ["static", "dynamic", "dynamic, balanced"])
@pytest.mark.parametrize("where", ["all", "first", "last"])
def test_a_tensor_that_is_written_to_in_between(counted: Counted, kind: str, where: str) -> None:
    _, leaves = siblings(KINDS[kind])
    warm(leaves)
    x = tensor()
    leaves[0](x)
    counted.since()
    part = {"all": x, "first": x[:, :2], "last": x[1, 3:]}[where]
    part.mul_(0.5)
    assert torch.equal(leaves[1](x), alone(leaves)[1](x))
    assert counted.since() == (1, 1)
    leaves[2](x)
    assert counted.since() == (0, 0)


def test_one_buffer_for_all_calls(counted: Counted) -> None:
    """A leaf that comes twice belongs to another call, whatever can be seen of its input."""
    _, leaves = siblings(KINDS["static"])
    warm(leaves)
    x = torch.randn(2, 80, K)
    for one in leaves[:2]:
        one(x)
    x[:, 3:5].add_(1.0)  # none of the rows that are compared
    counted.since()
    expected = [twin(x) for twin in alone(leaves)]
    assert counted.since() == (0, 3)
    assert all(torch.equal(one(x), y) for one, y in zip(leaves, expected, strict=True))
    assert counted.since() == (1, 0)


def test_another_interval(counted: Counted) -> None:
    on, leaves = siblings(KINDS["static"])
    warm(leaves)
    x = 3 * tensor()
    on.set(torch.tensor([999.0]))
    leaves[0](x)
    on.set(torch.tensor([10.0]))
    assert torch.equal(leaves[1](x), alone(leaves)[1](x))
    assert not torch.equal(leaves[1](x), leaves[0](x)[..., : leaves[1](x).shape[-1]])


def test_an_equal_tensor_is_another(counted: Counted) -> None:
    _, leaves = siblings(KINDS["static"])
    warm(leaves)
    x = tensor()
    counted.since()
    leaves[0](x)
    leaves[1](x.clone())
    assert counted.since() == (1, 1)  # the second is not known to have anyone behind it


def test_leaves_that_quantize_in_another_way(counted: Counted) -> None:
    on = clock()
    first = leaf(KINDS["static"], on, 24)
    for name, other in KINDS.items():
        if name != "static":
            assert leaf(other, on, 24).reading != first.reading
    assert leaf(KINDS["static"], on, 31).reading == first.reading
    wider = leaf(KINDS["static"], on, 24)
    assert wider.act_scale is not None
    wider.hold(dataclasses.replace(wider.tables, act_scale=wider.act_scale * 2))
    assert wider.reading != first.reading
    x = tensor()
    for _ in range(2):
        assert torch.equal(first(x), alone([first])[0](x))
        assert torch.equal(wider(x), alone([wider])[0](x))


def test_convolutions_and_branches_apart_do_not_share() -> None:
    on, low = clock(), -torch.ones(4)
    grid = affine_grid(low, -low)
    codes, scale = torch.ones(3, 4, 1, 1, dtype=torch.int8), torch.ones(3)
    state = LayerState("conv2d", Scheme(activation=STATIC), (3, 4, 1, 1), codes, scale, None, *grid)
    assert QuantConv2d(state, Geometry((3, 4, 1, 1)), on).reading is None
    apart = LayerState(
        "linear", Scheme(activation=STATIC, branches=2), (3, 4), codes[..., 0, 0], scale, None,
        torch.stack([grid[0]] * 2), torch.stack([grid[1]] * 2),
    )  # fmt: skip
    assert QuantLinear(apart, Geometry((3, 4)), on).reading is None


def test_other_backends_and_other_models(monkeypatch: pytest.MonkeyPatch, counted: Counted) -> None:
    _, leaves = siblings(KINDS["static"], 2)
    warm(leaves)
    x, int_mm = tensor(), next(b for b in BACKENDS if b.name == "int_mm")
    expected = alone(leaves)[1](x)
    leaves[0](x)
    counted.since()
    monkeypatch.setattr(tfmq.runtime.leaf, "pick", lambda *_: int_mm)
    leaves[1]._prepared = None
    torch.testing.assert_close(leaves[1](x), expected)
    assert counted.since() == (0, 0)  # int_mm's are not counted
    twin = alone(leaves)[1]
    warm(leaves)
    leaves[0](x)
    assert torch.equal(twin(x), leaves[1](x))


@pytest.mark.parametrize("own", [False, True])
def test_where_nobody_can_see_that_a_tensor_changed(own: bool) -> None:
    """Inference tensors off the CPU: shared only by what cannot have been read by another layer."""

    class Leaf:
        def __init__(self) -> None:
            self.reading, self.readers = Reading(b"", own), 1

    with torch.inference_mode():
        x = torch.empty(3, 4, device="meta")
    shared, first, second = SharedInput(), Leaf(), Leaf()
    for call in range(2):
        codes = Codes(torch.empty(1), None, None, None, torch.Size(), torch.float32)
        assert shared.read(first, x, reference) == (own and call > 0) and shared.codes is None
        if call:
            shared.keep(codes)
        assert shared.read(second, x, reference) == own
        assert (shared.codes is codes) == (own and call > 0)
        shared.keep(codes)
        assert shared.codes is None, "nobody is known to come"


# --- memory and copies ------------------------------------------------------------------------------------------------


def codes_of(on: RunState) -> "weakref.ref[Tensor]":
    entry = on.at(CPU).shared_input
    assert entry.codes is not None
    return weakref.ref(entry.codes.values)


@pytest.mark.parametrize("how", ["last reader", "input", "set", "another leaf"])
def test_codes_go(counted: Counted, how: str) -> None:
    on, leaves = siblings(KINDS["static"])
    stranger = leaf(KINDS["dynamic, balanced"], on, 24)
    warm(leaves)
    gc.collect()
    gc.disable()  # at once, and not when it pleases
    try:
        x = tensor()
        seen = weakref.ref(x)
        leaves[0](x)
        codes = codes_of(on)
        if how == "last reader":
            leaves[1](x)
            assert codes() is not None
            leaves[2](x)
        elif how == "set":
            on.set(torch.tensor([5.0]))
        elif how == "another leaf":
            stranger(x)
        del x
        assert seen() is None and codes() is None
    finally:
        gc.enable()


def test_a_model_is_not_held_by_its_clock(counted: Counted) -> None:
    on, leaves = siblings(KINDS["static"])
    warm(leaves)
    x = tensor()
    leaves[0](x)
    codes_of(on)
    gone = [weakref.ref(one) for one in leaves]
    del leaves
    gc.collect()
    assert all(one() is None for one in gone)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(counted: Counted, way: str) -> None:
    on, leaves = siblings(KINDS["static"])
    warm(leaves)
    x = tensor()
    leaves[0](x)
    codes_of(on)
    twins = copy.deepcopy(leaves) if way == "deepcopy" else pickle.loads(pickle.dumps(leaves))
    assert (twins[0].clock is on) == (way == "deepcopy")
    counted.since()
    found = [one(x) for one in twins]
    assert counted.since() == (1, 0)
    assert all(torch.equal(y, one(x)) for y, one in zip(found, alone(leaves), strict=True))


def test_under_compile(counted: Counted) -> None:
    _, leaves = siblings(KINDS["static, balanced, rotated"])
    warm(leaves)
    x = tensor()
    expected = [twin(x) for twin in alone(leaves)]
    torch._dynamo.reset()
    run = torch.compile(lambda x: [one(x) for one in leaves], backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(run(x), expected, strict=True))
