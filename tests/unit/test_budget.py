"""The bit budget against brute force."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfmq.decide.budget import Option, fewest_bytes, hull, least_error, total_error, total_size

layer = st.tuples(st.integers(1, 40), st.floats(0.001, 10), st.floats(0.01, 0.6)).map(
    lambda v: [Option(4, v[0], v[1]), Option(8, 2 * v[0], v[1] * v[2] ** 2), Option(16, 4 * v[0], 0.0)]
)
models = st.lists(layer, min_size=1, max_size=5).map(lambda layers: {str(i): o for i, o in enumerate(layers)})


def every(choices):
    for options in product(*choices.values()):
        yield dict(zip(choices, options, strict=True))


@given(models, st.integers(0, 400))
@settings(deadline=None, max_examples=200)
def test_least_error_against_every_plan(choices, budget):
    found = least_error(choices, budget)
    allowed = [plan for plan in every(choices) if total_size(plan) <= budget]
    assert (found is None) == (not allowed)
    if found is not None:
        assert total_size(found) <= budget and found.keys() == choices.keys()
        best = min(total_error(plan) for plan in allowed)
        # By price alone a knapsack is not solved to the last byte; one layer's worth is the bound.
        worst_layer = max(options[0].error for options in choices.values())
        assert total_error(found) <= best + worst_layer


@given(models, st.floats(0, 30))
@settings(deadline=None, max_examples=200)
def test_fewest_bytes_against_every_plan(choices, error):
    found = fewest_bytes(choices, error)
    assert found is not None
    assert total_error(found) <= error
    best = min(total_size(plan) for plan in every(choices) if total_error(plan) <= error)
    assert best <= total_size(found) <= best + max(options[-1].size for options in choices.values())


def test_an_error_that_cannot_be_met():
    assert fewest_bytes({"a": [Option(4, 1, 1.0), Option(8, 2, 0.5)]}, 0.4) is None


def test_the_same_layers_at_a_clear_budget():
    sensitive, robust = [Option(4, 10, 5.0), Option(8, 20, 0.1)], [Option(4, 10, 0.2), Option(8, 20, 0.1)]
    plan = least_error({"a": robust, "b": sensitive}, 30)
    assert plan is not None and (plan["a"].bits, plan["b"].bits) == (4, 8)


@pytest.mark.parametrize("middle", [0.2, 0.9])
def test_the_hull_leaves_out_what_lies_above(middle):
    options = [Option(4, 10, 1.0), Option(8, 20, middle), Option(16, 40, 0.0), Option(16, 50, 0.1)]
    kept = [o.bits for o in hull(options)]
    assert kept == ([4, 8, 16] if middle == 0.2 else [4, 16])
