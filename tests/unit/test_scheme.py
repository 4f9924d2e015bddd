"""Scheme, Recipe, Plan: data that goes through JSON unchanged."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfmq.scheme import DYNAMIC, PRESETS, STATIC, Plan, Recipe, Scheme

names = st.text(max_size=12)
schemes = st.builds(Scheme, st.integers(2, 8), st.integers(2, 8), st.sampled_from([STATIC, DYNAMIC]), st.booleans())
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
