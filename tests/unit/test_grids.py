"""All static grids of a model at once, and a clock that runs on several devices at a time."""

import copy
import gc
import threading
import types
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tfmq.runtime.leaf
from tfmq.formats.affine import affine_grid
from tfmq.geometry import Geometry
from tfmq.kernels.table import BACKENDS
from tfmq.runtime.grids import SMALLEST
from tfmq.runtime.leaf import QuantConv2d, QuantLinear
from tfmq.runtime.run_state import RunState
from tfmq.scheme import STATIC, Scheme
from tfmq.state import LayerState
from tfmq.timeline import Partition, TimeAxis

CPU, OTHER = torch.device("cpu"), torch.device("meta")
INTERVALS = 4
MIDDLES = [(i + 0.5) * 1000 / INTERVALS for i in range(INTERVALS)]


def clock() -> RunState:
    return RunState(TimeAxis(0.0, 1000.0), Partition.uniform(INTERVALS))


def leaf_of(on: RunState, seed: int = 0, conv: bool = False, branches: int = 1) -> QuantLinear | QuantConv2d:
    g = torch.Generator().manual_seed(seed)
    geometry = Geometry((6, 16, 1, 1) if conv else (6, 16))
    codes = torch.randint(-127, 128, geometry.shape, generator=g).to(torch.int8)
    shape = (INTERVALS,) if branches == 1 else (branches, INTERVALS)
    grid = affine_grid(-torch.rand(shape, generator=g) - 0.1, torch.rand(shape, generator=g) + 0.1)
    scheme = Scheme(activation=STATIC, branches=branches)
    state = LayerState("conv2d" if conv else "linear", scheme, geometry.shape, codes, torch.ones(6), None, *grid)
    return (QuantConv2d if conv else QuantLinear)(state, geometry, on)


def now(leaf: QuantLinear | QuantConv2d, branch: int = 0) -> tuple[Tensor, Tensor]:
    grid = leaf._grid(CPU, branch, None, leaf.clock.at(CPU))
    return grid.scale, grid.zero_point


def row_of_table(leaf: QuantLinear | QuantConv2d, interval: int, branch: int = 0) -> tuple[float, int]:
    scale, zero = leaf.act_scale.view(-1, INTERVALS), leaf.act_zero_point.view(-1, INTERVALS)
    return float(scale[branch, interval]), int(zero[branch, interval])


def right(leaf: QuantLinear | QuantConv2d, interval: int, branch: int = 0) -> None:
    scale, zero = now(leaf, branch)
    assert scale.shape == zero.shape == (1,) and scale.dtype == torch.float32 and zero.dtype == torch.int32
    assert (float(scale), int(zero)) == row_of_table(leaf, interval, branch)


class Launches(TorchDispatchMode):
    """Counts what would be launches on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("inference", [False, True])
def test_the_rows_are_those_of_the_tables(inference: bool) -> None:
    on = clock()
    leaves = [(leaf_of(on, 0), 0), (leaf_of(on, 1, conv=True), 0), *[(leaf_of(on, 2, branches=2), b) for b in (0, 1)]]
    with torch.inference_mode(inference):
        for leaf, branch in leaves:
            right(leaf, INTERVALS - 1, branch)
        for interval in (0, 3, 1, 2):
            on.set(torch.tensor([MIDDLES[interval]]))
            for leaf, branch in leaves:
                right(leaf, interval, branch)
    on.set(torch.tensor([MIDDLES[0]]))  # outside of the mode that they were made in
    for leaf, branch in leaves:
        right(leaf, 0, branch)


def test_no_leaf_reads_its_table_at_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfmq.runtime.leaf, "pick", lambda *_: BACKENDS[-1])

    def counts(leaves: int) -> tuple[Counter[str], Counter[str]]:
        on = clock()
        made = [leaf_of(on, seed, conv=seed % 2 == 0, branches=1 + seed % 3 // 2) for seed in range(leaves)]
        inputs = torch.randn(2, 16), torch.randn(2, 16, 3, 3)
        with torch.inference_mode():
            on.set(torch.tensor([999.0]), (0, 1))
            for leaf in made:
                leaf(inputs[leaf.geometry.is_conv])
            with Launches() as at_set:
                on.set(torch.tensor([100.0]), (0, 1))
            with Launches() as at_call:
                for leaf in made:
                    leaf(inputs[leaf.geometry.is_conv])
        return at_set.count, at_call.count

    few, many = counts(3), counts(40)
    assert few[0] == many[0] and many[0]["index_select"] == 1
    assert many[1]["index_select"] == 0


def test_addresses_stay() -> None:
    """What a captured graph reads: whatever else comes, goes or moves."""
    on = clock()
    first = leaf_of(on)
    before = [t.data_ptr() for t in now(first)]
    assert all(address % 16 == 0 for address in before)
    others = [leaf_of(on, seed) for seed in range(3 * SMALLEST)]
    for leaf in others:
        assert all(t.data_ptr() % 16 == 0 for t in now(leaf))
    assert len(on.at(CPU).grids._blocks[INTERVALS]) == 3
    on.set(torch.tensor([MIDDLES[1]]))
    first.tables = first.tables.moved(Tensor.clone)  # away and back
    del others
    gc.collect()
    right(first, 1)
    on.set(torch.tensor([MIDDLES[2]]))
    assert [t.data_ptr() for t in now(first)] == before
    right(first, 2)


def test_places_are_used_again() -> None:
    on = clock()
    for _ in range(5):
        leaves = [leaf_of(on, seed) for seed in range(SMALLEST)]
        for leaf in leaves:
            now(leaf)
        assert len({now(leaf)[0].data_ptr() for leaf in leaves}) == SMALLEST
        del leaves, leaf
        gc.collect()
    assert len(on.at(CPU).grids._blocks[INTERVALS]) == 1


def test_tables_that_are_replaced() -> None:
    on = clock()
    leaf = leaf_of(on)
    right(leaf, 3)
    leaf.hold(replace(leaf.tables, act_scale=leaf.act_scale * 2))
    right(leaf, 3)
    leaf.hold(replace(leaf.tables, act_zero_point=leaf.act_zero_point + 1))
    right(leaf, 3)
    twin = copy.deepcopy(leaf)
    assert now(twin)[0].data_ptr() != now(leaf)[0].data_ptr()
    twin.hold(replace(twin.tables, act_scale=twin.act_scale * 2))
    right(twin, 3)
    right(leaf, 3)


def test_a_cast_leaves_the_tables_alone() -> None:
    leaf = leaf_of(clock())
    before = leaf.reading
    leaf.half().to(torch.bfloat16)
    assert leaf.tables.act_scale.dtype == torch.float32 and leaf.reading is before
    right(leaf, 3)


def test_another_clock() -> None:
    leaf = leaf_of(clock())
    right(leaf, 3)
    leaf.clock = clock()
    leaf.clock.set(torch.tensor([MIDDLES[1]]))
    right(leaf, 1)


def test_nothing_is_laid_down_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    on = clock()
    known, new = leaf_of(on, 0), leaf_of(on, 1)
    address = now(known)[0].data_ptr()
    with monkeypatch.context() as capture:
        capture.setattr(tfmq.runtime.leaf, "capturing", lambda: True)
        right(new, 3)
        assert not new._rows
        assert now(known)[0].data_ptr() == address
    right(new, 3)
    assert new._rows


# --- several devices ------------------------------------------------------------------------------------------------


def test_a_call_on_another_device_leaves_this_one_alone() -> None:
    """The host runs the conditional rows on one GPU and the unconditional ones on another, in a thread for each."""
    on = clock()
    leaf = leaf_of(on)
    turn, done = threading.Event(), threading.Event()

    def other() -> None:
        on.set(torch.empty(1, device=OTHER), (1,))  # a tensor without a value: the place of a second GPU
        done.set()
        turn.wait(60)

    on.set(torch.tensor([MIDDLES[2]]), (0, 1))
    entry = on.at(CPU).shared_input.codes = object()
    thread = threading.Thread(target=other)
    thread.start()
    done.wait(60)
    try:
        assert on.at(CPU).branches == (0, 1) and on.at(OTHER).branches == (1,)
        assert on.at(CPU).shared_input.codes is entry
        right(leaf, 2)
        on.set(torch.tensor([MIDDLES[1]]), (0,))
        right(leaf, 1)
        assert on.at(OTHER).branches == (1,), "the other thread's"
    finally:
        turn.set()
        thread.join()
    on.set(torch.tensor([MIDDLES[0]]), (0, 0))
    assert on.at(OTHER).branches == (0, 0), "nobody has calls there any more"


def test_one_thread_on_two_devices_moves_both() -> None:
    on = clock()
    on.at(CPU)
    on.at(OTHER).leader = weakref.ref(threading.current_thread())
    on.set(torch.tensor([MIDDLES[1]]), (0, 1))
    assert on.at(OTHER).branches == (0, 1)


def test_many_threads() -> None:
    """Devices come while others run; every thread sees its own branches and its own interval alone."""
    on, rounds = clock(), 100
    failed: list[object] = []

    def run(number: int) -> None:
        device, leaf = torch.device("cpu", number), leaf_of(on, number)  # one memory under the names of several devices
        for i in range(rounds):
            interval = (number + i) % INTERVALS
            t = torch.tensor([MIDDLES[interval]])
            on.set(types.SimpleNamespace(device=device, reshape=t.reshape), (number,))
            grid = leaf._grid(device, 0, None, on.at(device))
            seen = on.at(device).branches, int(on.index(device)), (float(grid.scale), int(grid.zero_point))
            if seen != ((number,), interval, row_of_table(leaf, interval)):
                failed.append((number, seen))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
