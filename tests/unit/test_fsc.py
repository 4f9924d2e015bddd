"""The TIB in integers and its activation grids per timestep."""

import pytest
import torch

from support.temporal import AXIS, small_graph, small_times
from tfmq.temporal.fsc import FiniteSet, finite_set_grid, nearest_tib, weight_codes, weight_grid
from tfmq.timeline import TimeAxis


def test_the_finite_set_of_a_discrete_model_is_its_integers():
    points = FiniteSet.of(TimeAxis(0, 999)).points
    assert torch.equal(points, torch.arange(1000.0))


def test_nearest_point_of_the_finite_set():
    times = FiniteSet.of(TimeAxis(0.0, 1.0), 11)
    t = torch.tensor([-3.0, 0.0, 0.04, 0.06, 0.96, 5.0])
    assert times.index(t).tolist() == [0, 0, 0, 1, 10, 10]


def test_a_grid_per_timestep_spans_that_timestep():
    x = torch.tensor([[-1.0, 3.0, 0.0], [0.5, 0.25, 0.1]])
    scale, zero = finite_set_grid(x)
    low, high = -zero * scale, (255 - zero) * scale
    assert torch.allclose(high - low, torch.tensor([4.0, 0.5]))
    assert torch.all(low <= x.amin(1).clamp_max(0) + scale) and torch.all(high >= x.amax(1) - scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_grid_is_no_worse_than_min_max(bits):
    weight = torch.randn(6, 400, generator=torch.Generator().manual_seed(1)) ** 3
    scale, zero = weight_grid(weight, bits)
    codes = weight_codes(weight, scale, zero, bits)
    assert int(codes.max()) <= 2**bits - 1
    back = (codes.float() - zero.unsqueeze(1)) * scale.unsqueeze(1)
    low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    step = ((high - low) / (2**bits - 1)).unsqueeze(1)
    plain = ((weight - low.unsqueeze(1)) / step).round() * step + low.unsqueeze(1)

    def error(q):
        return (q - weight).abs().pow(2.4).sum(1)

    assert torch.all(error(back) <= error(plain) * 1.05)


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_run_equals_the_dequantized_layer(bits):
    graph, times = small_graph(), small_times()
    tib = nearest_tib(graph, times, bits, per_timestep=True)
    x = graph.inputs(times.points)["time_embed.2"]
    layer, index = tib.layers["time_embed.2"], torch.arange(200)
    scale, zero = layer.act_scale.unsqueeze(1), layer.act_zero_point.unsqueeze(1)
    rounded = ((x / scale).round() + zero).clamp(0, 255) - zero
    expected = (rounded.double() * scale.double()) @ layer.weight.double().t() + layer.bias.double()
    assert torch.allclose(layer.run(x, index).double(), expected, atol=1e-4)


def test_a_grid_per_timestep_beats_one_grid():
    graph, times = small_graph(), small_times()
    floats = graph.features(times.points)

    def error(tib):
        found = tib.features(times.points)
        return sum(float((found[p] - floats[p]).square().sum()) for p in graph.outputs)

    assert error(nearest_tib(graph, times, 8, per_timestep=True)) < error(nearest_tib(graph, times, 8))


def test_bytes_count_packed_codes():
    graph, times = small_graph(), small_times()
    eight, four = nearest_tib(graph, times, 8), nearest_tib(graph, times, 4)
    codes = sum(layer.weight.numel() for layer in graph.layers.values())
    assert eight.nbytes - four.nbytes == codes // 2
    assert AXIS.high == times.points[-1]
