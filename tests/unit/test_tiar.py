"""TIAR: rounding that keeps the temporal features."""

import pytest
import torch

from support.temporal import small_graph, small_times
from tfmq.temporal.fsc import nearest_tib
from tfmq.temporal.tiar import tiar


def relative_error(graph, times, tib):
    floats, found = graph.features(times.points), tib.features(times.points)
    error = sum(float((found[p] - floats[p]).square().sum()) for p in graph.outputs)
    return (error / sum(float(floats[p].square().sum()) for p in graph.outputs)) ** 0.5


@pytest.mark.parametrize("bits", [8, 4])
def test_at_most_half_the_error_of_nearest(bits):
    graph, times = small_graph(), small_times()
    result = tiar(graph, times, bits)
    plain = relative_error(graph, times, nearest_tib(graph, times, bits))
    assert relative_error(graph, times, result.tib) <= plain / 2
    assert all(int(layer.codes.max()) <= 2**bits - 1 for layer in result.tib.layers.values())
    assert all(layer.act_scale.numel() == 200 for layer in result.tib.layers.values())


def test_the_joint_stage_never_makes_it_worse_and_lowers_a_rounded_loss():
    graph, times = small_graph(), small_times()
    one, both = tiar(graph, times, 4), tiar(graph, times, 4, steps=40, batch=64, rate=0.02)
    assert relative_error(graph, times, both.tib) <= relative_error(graph, times, one.tib) + 1e-9
    assert set(both.losses) == {"nearest", "feedback", "joint"}


def test_works_in_inference_mode_and_leaves_the_graph_alone():
    with torch.inference_mode():
        graph, times = small_graph(), small_times()
        before = {p: layer.weight.clone() for p, layer in graph.layers.items()}
        result = tiar(graph, times, 4, steps=3)
    assert all(torch.equal(before[p], layer.weight) for p, layer in graph.layers.items())
    assert not next(iter(result.tib.layers.values())).codes.is_inference()


def test_an_interrupt_passes_through():
    class Interrupt(BaseException):
        pass

    graph, times = small_graph(), small_times()
    calls = []

    def progress(done, total):
        calls.append((done, total))
        if done == 3:
            raise Interrupt

    with pytest.raises(Interrupt):
        tiar(graph, times, 8, progress=progress)
    assert calls == [(1, 5), (2, 5), (3, 5)]
