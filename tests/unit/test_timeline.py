"""Time axis, intervals, and the clock that all leaves of a model share."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq.timeline import Clock, Partition, TimeAxis

AXIS = TimeAxis(0.0, 999.0)


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    # 1/64 steps: exact in float32, so that the plain comparison below is the truth at the edges too
    edges = draw(st.lists(st.integers(1, 63), unique=True, max_size=12))
    return Partition(tuple(sorted(e / 64 for e in edges)))


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (0.0, float("nan"))])
def test_an_axis_needs_a_span(low: float, high: float) -> None:
    with pytest.raises(ValueError):
        TimeAxis(low, high)


def test_positions_are_linear_and_clamped() -> None:
    t = torch.tensor([[-5.0, 0.0, 499.5], [999.0, 1200.0, 99.9]])
    expected = torch.tensor([[0.0, 0.0, 0.5], [1.0, 1.0, 0.1]])
    torch.testing.assert_close(AXIS.position(t), expected)
    for dtype in (torch.int64, torch.float64, torch.bfloat16):
        position = AXIS.position(torch.tensor([0, 999]).to(dtype))
        assert position.dtype == torch.float32
        assert position[0] == 0.0 and position[1] == 1.0
    # a flow model, timesteps 0..1
    torch.testing.assert_close(TimeAxis(0.0, 1.0).position(torch.tensor(0.25)), torch.tensor(0.25))


@pytest.mark.parametrize("edges", [(0.0,), (1.0,), (0.5, 0.5), (0.6, 0.4), (-0.1,), (0.2, 1.2)])
def test_edges_must_ascend_inside(edges: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        Partition(edges)


def test_uniform() -> None:
    assert Partition.uniform(1).edges == ()
    assert Partition.uniform(1).count == 1
    assert Partition.uniform(4).edges == (0.25, 0.5, 0.75)
    assert Partition.uniform(4).centers == (0.125, 0.375, 0.625, 0.875)
    with pytest.raises(ValueError):
        Partition.uniform(0)


@given(partitions(), st.lists(st.integers(0, 256), min_size=1, max_size=20))
def test_index_counts_the_edges_at_or_below(partition: Partition, positions: list[int]) -> None:
    p = torch.tensor([n / 256 for n in positions])
    index = partition.index(p)
    assert index.dtype == torch.int64
    assert index.tolist() == [sum(e <= n / 256 for e in partition.edges) for n in positions]
    assert partition.index(torch.tensor(partition.centers)).tolist() == list(range(partition.count))
    assert partition.index(p.reshape(1, -1)).shape == (1, len(positions))


def test_clock_starts_at_the_noisy_end_and_follows_in_place() -> None:
    clock = Clock(AXIS, Partition.uniform(4))
    index = clock.index(torch.device("cpu"))
    address = index.data_ptr()
    assert index.shape == (1,) and index.dtype == torch.int64
    assert int(index) == 3
    for t, expected in ((0.0, 0), (300.0, 1), (999.0, 3), (550.0, 2)):
        clock.set(torch.tensor([t]))
        assert clock.index(torch.device("cpu")) is index
        assert index.data_ptr() == address
        assert int(index) == expected


def test_clock_takes_any_shape_and_type_of_timesteps() -> None:
    clock = Clock(AXIS, Partition.uniform(10))
    for t in (
        torch.tensor(555),
        torch.tensor([555, 555]),
        torch.tensor([[555.0], [555.0]]),
        torch.tensor([555.0], dtype=torch.float64),
        torch.tensor([556.0], dtype=torch.bfloat16),
    ):
        clock.set(torch.tensor([0.0]))
        clock.set(t)
        assert int(clock.index(torch.device("cpu"))) == 5


@pytest.mark.parametrize("touched", [True, False])
@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("by_set", [True, False])
def test_clock_and_inference_mode(touched: bool, written: bool, by_set: bool) -> None:
    clock = Clock(AXIS, Partition.uniform(4))
    with torch.inference_mode(touched):
        if by_set:
            clock.set(torch.tensor([999.0]))
        index = clock.index(torch.device("cpu"))
    assert not index.is_inference()
    for t, expected in ((300.0, 1), (0.0, 0)):
        with torch.inference_mode(written):
            clock.set(torch.tensor([t]))
        assert clock.index(torch.device("cpu")) is index
        assert int(index) == expected
    with torch.inference_mode():
        stale = torch.tensor([600.0])  # an inference tensor, used outside of inference mode
    clock.set(stale)
    assert int(index) == 2
    # a layer under autograd may save it
    assert torch.arange(4.0, requires_grad=True).index_select(0, index).sum().requires_grad


OTHER = "cuda:0" if torch.cuda.is_available() else "meta"


def test_clock_follows_devices() -> None:
    cpu, other = torch.device("cpu"), torch.device(OTHER)
    clock = Clock(AXIS, Partition.uniform(4))
    clock.set(torch.tensor([300.0]))
    there = clock.index(other)
    assert there.device == other and there is clock.index(other)
    here = clock.index(cpu)
    assert here is not there and int(here) == 1
    clock.set(torch.tensor([600.0]))
    assert clock.index(other) is there and clock.index(cpu) is here
    assert int(here) == 2
    if OTHER != "meta":  # a meta tensor has no value
        assert int(there) == 2
        clock.set(torch.tensor([0.0], device=other))
        assert int(here) == int(there) == 0


def test_a_new_device_starts_where_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(AXIS, Partition.uniform(4))
    clock.set(torch.tensor([300.0]))
    first = clock.index(torch.device("cpu"))
    # the same slot under the name of another device stands for one that has a value to read
    elsewhere = torch.device("cpu", 0)
    assert elsewhere != torch.device("cpu")
    second = clock.index(elsewhere)
    assert second is not first
    assert int(second) == 1
    clock.set(torch.tensor([999.0]))
    assert int(first) == int(second) == 3


def test_copies_of_a_clock() -> None:
    clock = Clock(AXIS, Partition.uniform(4))
    clock.set(torch.tensor([300.0]))
    assert copy.deepcopy(clock) is clock
    assert copy.deepcopy({"leaf": clock})["leaf"] is clock
    stored = pickle.loads(pickle.dumps(clock))
    assert stored is not clock
    assert (stored.axis, stored.partition) == (clock.axis, clock.partition)
    assert int(stored.index(torch.device("cpu"))) == 1
