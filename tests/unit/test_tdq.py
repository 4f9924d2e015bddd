"""Ranges as a learned function of time, and what they are measured against."""

import pytest
import torch

from bench.temporal import ranges as temporal_ranges
from tfmq.decide import tdq
from tfmq.decide.grids import static_grid
from tfmq.formats.affine import quantize_affine, quantize_rows
from tfmq.observe.calibration import Calibration
from tfmq.observe.layer import BINS
from tfmq.observe.statistics import LayerStatistics
from tfmq.scheme import DYNAMIC, ONE_RANGE, STATIC, TDQ, Plan, Recipe, Scheme
from tfmq.timeline import Partition, TimeAxis

INTERVALS = 12
PARTITION = Partition.uniform(INTERVALS)


def statistics(widths, seed=0, visited=None, kind="linear"):
    """Normal inputs whose spread is widths[i] in interval i."""
    noise = torch.Generator().manual_seed(seed)
    low, high, counts = [], [], []
    for i, width in enumerate(widths):
        x = torch.randn(4000, generator=noise) * width
        low.append(x.min())
        high.append(x.max())
        reach = 1.3 * float(x.abs().max())
        counts.append(torch.histc(x, BINS, -reach, reach) if visited is None or i in visited else torch.zeros(BINS))
    low, high = torch.stack(low), torch.stack(high)
    reach = 1.3 * torch.maximum(-low, high)
    energy = torch.tensor([[1e-4, 1.0]], dtype=torch.float64).repeat(len(widths), 1)
    if kind == "conv2d":
        energy = energy * 0
    return LayerStatistics(kind, (4, 4), 0, low, high, None, torch.stack(counts), -reach, reach, energy)


@pytest.fixture(scope="module")
def layers():
    ramp = torch.linspace(1.0, 8.0, INTERVALS).tolist()
    return {"moves": statistics(ramp), "still": statistics([2.0] * INTERVALS, seed=1, kind="conv2d")}


@pytest.fixture(scope="module")
def ranges(layers):
    return tdq.fit(layers, PARTITION, 6, steps=150)


def test_tdq_follows_time_where_there_is_something_to_follow(layers, ranges):
    found = temporal_ranges.compare(layers, ranges, PARTITION.centers, 6, layers)
    assert found["moves"].tdq < 0.9 * found["moves"].one
    assert found["moves"].tdq < 1.1 * found["moves"].intervals
    assert found["still"].tdq <= 1.02 * found["still"].one
    assert found["still"].per_token is None
    assert found["moves"].per_token == pytest.approx(1e-2 * 255 / 63)


def test_interval_weights():
    weights = temporal_ranges.interval_weights(torch.tensor([1.0, 2.0, 11.0, 29.0]), torch.tensor([0.0, 10, 20, 30]))
    assert weights.tolist() == [0.5, 0.25, 0.25]


def test_unvisited_intervals_are_filled_smoothly():
    ramp = torch.linspace(1.0, 8.0, INTERVALS).tolist()
    hole = {"a": statistics(ramp, visited=set(range(INTERVALS)) - {5, 6})}
    scale, _ = tdq.fit(hole, PARTITION, 8, steps=150).table(torch.tensor(PARTITION.centers))["a"]
    assert 0.6 * float(scale[4]) < float(scale[5]) < 1.7 * float(scale[7])


def test_a_finer_table_of_the_same_function(ranges):
    centers = torch.tensor(PARTITION.centers)
    fine = torch.linspace(0, 1, 101)
    coarse_scale = ranges.table(centers, 6)["moves"][0]
    fine_scale = ranges.table(fine, 6)["moves"][0]
    assert fine_scale.shape == (101,)
    assert float(fine_scale.diff().abs().max()) < 0.2 * float(coarse_scale.max())


def test_fit_is_deterministic_and_works_in_inference_mode(layers, ranges):
    with torch.inference_mode():
        again = tdq.fit(layers, PARTITION, 6, steps=150)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters, ranges.parameters, strict=True))


def test_one_range_covers_the_widest_interval_unless_told_to_look_elsewhere(layers):
    s = layers["moves"]
    _, high = tdq.one_range(s, "minmax")
    assert float(high) == pytest.approx(float(s.high.max()), rel=0.02)
    only_first = torch.zeros(INTERVALS).index_fill(0, torch.tensor([0]), 1.0)
    _, narrow = tdq.one_range(temporal_ranges.weighted(s, only_first), "mse")
    assert float(narrow) < 0.5 * float(high)


def test_over_time_serves_the_static_layers_of_its_recipes(layers):
    calibration = Calibration("", "", TimeAxis(0, 999), PARTITION, layers | {"twin": layers["moves"]}, {})
    schemes = {"moves": Scheme(8, 6, STATIC), "still": Scheme(8, 6, DYNAMIC), "twin": Scheme(8, 6, STATIC)}

    def grids(ranges):
        return tdq.over_time(Plan(Recipe("r", 8, 6, ranges=ranges), schemes), calibration)

    assert grids("mse") == {}
    one, learnt = grids(ONE_RANGE), grids(TDQ)
    assert set(one) == set(learnt) == {"moves", "twin"}
    assert len(set(one["moves"][0].tolist())) == 1 and len(set(learnt["moves"][0].tolist())) > 6
    # Layers that read one tensor are to share its codes, and a file holds no tensor twice.
    for a, b in zip(learnt["moves"], learnt["twin"], strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


def test_six_bits_are_six_bits(layers):
    scale, zero = static_grid(layers["moves"], "mse", 6)
    assert int(zero.max()) <= 63
    codes, _, _ = quantize_rows(torch.randn(10, 40), bits=6)
    assert int(codes.min()) == -32 and int(codes.max()) == 31
    from tfmq.geometry import Geometry
    from tfmq.runtime.leaf import QuantLinear
    from tfmq.runtime.run_state import RunState
    from tfmq.solve.layer import solve_layer

    weight = torch.eye(4)
    state = solve_layer(Scheme(8, 6, STATIC), layers["moves"], weight, "mse")
    clock = RunState(TimeAxis(0, 999), PARTITION)
    clock.set(torch.tensor([0.0]))
    x = torch.tensor([[-1e3, -0.1, 0.1, 1e3]])
    y = QuantLinear(state, Geometry((4, 4)), clock)(x)
    top = (63 - zero[0]) * scale[0]
    assert float(y.max()) == pytest.approx(float(top), rel=1e-3)
    assert float(y.min()) == pytest.approx(float(-zero[0] * scale[0]), rel=1e-3)
    assert int(quantize_affine(y, scale[:1], zero[:1]).max()) == 63
