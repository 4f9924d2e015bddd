"""Disturbance-aware selection: errors by their definition, the budget kept, no layer worse than the reference."""

import itertools

import pytest
import torch

from bench.temporal.error import selected_features
from support.temporal import small_graph, small_times
from tfmq.errors import TfmqError
from tfmq.temporal.fsc import FiniteSet
from tfmq.temporal.selection import (
    _knapsack,
    _Option,
    feature_errors,
    int8_rows,
    select,
)
from tfmq.temporal.tiar import tiar
from tfmq.timeline import TimeAxis


def test_errors_by_hand():
    times = FiniteSet.of(TimeAxis(0, 3), 4)
    floats = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    found = floats.clone()
    found[0] = torch.tensor([-0.9, 0.0])  # nearest to the feature of t = 2
    errors = feature_errors(floats, found, times, torch.tensor([0, 0, 1, 1]), 2)
    assert errors.rel_l2 == pytest.approx([(1.9**2 / 2) ** 0.5, 0.0])
    assert errors.cosine == pytest.approx([-1.0, 1.0])
    assert errors.mismatch == [2.0, 0.0]


def test_int8_rows_are_within_half_a_step():
    features = torch.randn(50, 20, generator=torch.Generator().manual_seed(3))
    back, size = int8_rows(features)
    span = max(float(features.max() - features.min()), 1e-9)
    assert float((back - features).abs().max()) <= span / 255 / 2 + 1e-6
    assert 1000 < size <= 1000 + 8 * 50


def test_knapsack_against_trying_everything():
    noise = torch.Generator().manual_seed(5)
    for _ in range(20):
        options = [
            [
                _Option(
                    "",
                    "",
                    (),
                    int(torch.randint(1, 60, (1,), generator=noise)),
                    float(torch.rand(1, generator=noise)),
                    1,
                )
                for _ in range(4)
            ]
            for _ in range(3)
        ]
        budget = 90
        best = min(
            (sum(o.squared for o in c) for c in itertools.product(*options) if sum(o.bytes for o in c) <= budget),
            default=None,
        )
        picked = _knapsack(options, [1.0] * 3, budget)
        if best is None:
            assert picked is None
        else:
            assert sum(o.bytes for o in picked) <= budget
            # Bytes are rounded up to 1/1024 of the budget, so an exactly full budget may be missed.
            tight = min(
                (
                    sum(o.squared for o in c)
                    for c in itertools.product(*options)
                    if sum(o.bytes for o in c) <= budget - 1
                ),
                default=float("inf"),
            )
            assert best - 1e-9 <= sum(o.squared for o in picked) <= tight + 1e-9


@pytest.mark.parametrize("reference", ["int8", "int4"])
def test_no_layer_worse_than_the_reference_at_no_more_bytes(reference):
    graph, times = small_graph(), small_times()
    tibs = {"int8": tiar(graph, times, 8).tib, "int4": tiar(graph, times, 4).tib}
    chosen = select(graph, times, tibs, reference=reference, intervals=10)
    assert chosen.bytes <= chosen.budget == tibs[reference].nbytes
    floats, found = graph.features(times.points), selected_features(chosen, graph, times, tibs)
    plain = tibs[reference].features(times.points)
    for path in graph.outputs:
        error, before = ((f[path] - floats[path]).norm() / floats[path].norm() for f in (found, plain))
        assert error <= before + 1e-9
        assert float(error) == pytest.approx(chosen.choices[path].rel_l2, rel=1e-3, abs=1e-9)
        assert chosen.choices[path].why


def test_a_large_budget_takes_the_best_and_a_tiny_one_is_refused():
    graph, times = small_graph(), small_times()
    tibs = {"int8": tiar(graph, times, 8).tib}
    everything = select(graph, times, tibs, reference="int8", budget=10**9, float_bytes=4)
    assert max(c.rel_l2 for c in everything.choices.values()) < 1e-6
    with pytest.raises(TfmqError, match="raise the budget"):
        select(graph, times, tibs, reference="int8", budget=10)
    caches = select(graph, times, tibs, reference="int8", budget=3 * 24 * 200 + 3 * 8 * 200)
    assert caches.bytes <= caches.budget
