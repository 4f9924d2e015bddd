"""Scheme, Recipe, Plan: data that goes through JSON unchanged, and schemes that no layer can have."""

import dataclasses
import json

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tfmq.decide.candidates import scheme_of
from tfmq.formats.affine import dequantize_weight
from tfmq.formats.hadamard import unrotate
from tfmq.observe.statistics import LayerStatistics
from tfmq.scheme import DYNAMIC, FP4, INT, NF4, NONE, PRESETS, STATIC, Plan, Recipe, Scheme
from tfmq.solve.layer import solve_layer

CHANNELS = 256
names = st.text(max_size=12)
# What can be said, most of it wrong.
said = st.builds(
    Scheme, st.integers(0, 9), st.integers(0, 17), st.sampled_from([STATIC, DYNAMIC, NONE, "later", ""]), st.booleans(),
    st.integers(-1, 3), st.sampled_from([0, 16, 48, 64, 256, -16, 8]), st.sampled_from([0, 16, 32, 48, 256, 8, -32]),
    st.sampled_from([INT, NF4, FP4, "int9"]), st.booleans(),
)  # fmt: skip
widths = st.sampled_from([16, 32, 64, 128, 256])
schemes = st.builds(
    lambda four, *rest, group, rotation, permuted: Scheme(
        4 if four else 8, *rest, rotation, group if four else 0, permuted=permuted and rotation > 0
    ),
    st.booleans(), st.integers(2, 8), st.sampled_from([STATIC, DYNAMIC, NONE]), st.booleans(), st.sampled_from([1, 2]),
    group=widths, rotation=st.one_of(st.just(0), widths), permuted=st.booleans(),
)  # fmt: skip
recipes = st.builds(
    Recipe, names, st.integers(2, 8), st.integers(2, 8), st.booleans(),
    st.sampled_from(["auto", STATIC, DYNAMIC]), st.sampled_from(["mse", "percentile", "minmax"]),
)  # fmt: skip
texts = st.dictionaries(names, names, max_size=3)


@given(st.builds(Plan, recipes, st.dictionaries(names, schemes, max_size=3), texts, texts))
def test_a_plan_survives_json(plan: Plan) -> None:
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert all(isinstance(s, Scheme) for s in again.layers.values())


def test_a_plan_of_another_version_is_no_silent_guess() -> None:
    data = Plan(PRESETS["W8A8"], {"a": Scheme()}).to_json()
    data["layers"]["a"]["colour"] = "red"
    with pytest.raises(TypeError):
        Plan.from_json(data)
    with pytest.raises(KeyError):
        Plan.from_json({"recipe": {}})


@given(said)
def test_a_scheme_is_read_where_it_has_no_problem_and_refused_with_it_elsewhere(scheme: Scheme) -> None:
    data = json.loads(json.dumps(Plan(PRESETS["W8A8"], {"a": scheme}).to_json()))
    problem = scheme.problem()
    if problem is None:
        assert Plan.from_json(data).layers == {"a": scheme}
    else:
        assert problem and "\n" not in problem and not problem.endswith(".")
        with pytest.raises(ValueError, match="layer a has ") as caught:
            Plan.from_json(data)
        assert str(caught.value) == f"layer a has {problem}"


@settings(max_examples=60, deadline=None)
@given(st.one_of(said, schemes))
def test_a_layer_can_have_what_has_no_problem(scheme: Scheme) -> None:
    assume(scheme.problem() is None and scheme.weight_format == INT)
    weight = torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(0))
    found = statistics(CHANNELS)
    state = solve_layer(scheme, found, weight, "minmax")
    codes = dequantize_weight(state.codes, state.scale) if state.packed is None else state.packed.dequantize()
    made = unrotate(codes, scheme.rotation, found.permutations if scheme.permuted else None)
    made = made if state.balance is None else made / state.balance
    assert float((made - weight).norm() / weight.norm()) < (0.2 if scheme.weight_bits == 4 else 0.02)


@given(schemes)
def test_what_can_be_has_no_problem(scheme: Scheme) -> None:
    assert scheme.problem() is None


@pytest.mark.parametrize("recipe", PRESETS.values(), ids=lambda r: r.name)
@pytest.mark.parametrize("channels", [30, 48, 64, 320])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_what_the_rule_decides_has_no_problem(recipe: Recipe, channels: int, kind: str) -> None:
    for bits in (recipe.weight_bits, 4, 8):
        for group in (16, 32, 64, 128):
            chosen, _ = scheme_of(dataclasses.replace(recipe, group=group), statistics(channels, kind), bits)
            assert chosen.problem() is None


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"weight_bits": 6}, "6 bits per weight"), ({"weight_bits": "8"}, "weight_bits '8', where an int"),
        ({"balanced": 1}, "balanced 1, where a bool"), ({"branches": True}, "branches True, where an int"),
        ({"activation": "later"}, "activation 'later'"), ({"activation_bits": 16}, "16 activation bits"),
        ({"weight_format": "int9"}, "weight format 'int9'"), ({"weight_format": NF4}, "the format nf4"),
        ({"weight_bits": 4}, "groups of 0"), ({"weight_bits": 4, "group": 48}, "groups of 48"),
        ({"branches": 3}, "3 branches"), ({"rotation": 8}, "blocks of 8"), ({"permuted": True}, "permutations"),
    ],
    ids=str,
)  # fmt: skip
def test_problems_are_told(changed: dict, says: str) -> None:
    assert Scheme().problem() is None
    assert says in (dataclasses.replace(Scheme(), **changed).problem() or "")


def statistics(channels: int, kind: str = "linear") -> LayerStatistics:
    """Of a balanced input of four intervals, with all that a scheme may ask for."""
    counts = torch.ones(4, 32, dtype=torch.long)
    shape = (4, channels, 3, 3) if kind == "conv2d" else (4, channels)
    errors = torch.tensor([[1e-4, 1.0]], dtype=torch.float64).repeat(4, 1)
    plain = LayerStatistics(
        kind, shape, 0, torch.full((4,), -1.0), torch.ones(4), torch.linspace(0.5, 2, channels), counts,
        torch.full((4,), -1.0), torch.ones(4), errors, branches=torch.stack([counts, counts]),
    )  # fmt: skip
    if kind == "conv2d" or channels % 16:
        return plain
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(1)).unsqueeze(0)
    quiet = dataclasses.replace(plain, row_error=errors * torch.tensor([1e-3, 1.0]))
    return dataclasses.replace(plain, rotated=quiet, permutations=order)


def test_labels_tell_schemes_apart() -> None:
    assert Scheme().label == "W8A8 static"
    assert Scheme(4, 8, DYNAMIC, True).label == "W4A8 dynamic balanced"


def test_presets() -> None:
    assert all(name == recipe.name for name, recipe in PRESETS.items())
    assert PRESETS["W8A8"].convolutions and not PRESETS["W8A8 Linear only"].convolutions


@pytest.mark.parametrize("thing", [Scheme(), PRESETS["W8A8"], Plan(PRESETS["W8A8"], {})])
def test_frozen(thing: object) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        thing.name = "x"
