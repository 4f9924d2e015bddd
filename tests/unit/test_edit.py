"""A plan that a person changed: taken as it says, or refused with the layer and the reason."""

import json

import pytest
import torch

from tfmq.decide.edit import edited
from tfmq.decide.plan import decide
from tfmq.errors import TfmqError
from tfmq.observe.calibration import Calibration
from tfmq.observe.statistics import LayerStatistics
from tfmq.scheme import PRESETS, STATIC, Plan, Scheme
from tfmq.timeline import Partition, TimeAxis

KINDS = {"a": "linear", "conv": "conv2d", "odd": "linear", "kept": "linear", "unseen": "linear"}
KEEP = {"kept": "first layer"}


def statistics(kind: str, channels: int, order: int) -> LayerStatistics:
    shape = (8, channels, 3, 3) if kind == "conv2d" else (8, channels)
    return LayerStatistics(
        kind, shape, order, torch.full((4,), -1.0), torch.ones(4), None, torch.ones(4, 32, dtype=torch.long),
        torch.full((4,), -1.0), torch.ones(4), torch.ones(4, 2, dtype=torch.float64),
    )  # fmt: skip


@pytest.fixture
def calibration() -> Calibration:
    sizes = {"a": 96, "conv": 64, "odd": 30, "kept": 64}
    layers = {path: statistics(KINDS[path], size, i) for i, (path, size) in enumerate(sizes.items())}
    return Calibration("model", "EPS", TimeAxis(0, 999), Partition.uniform(4), layers, {})


@pytest.fixture
def plan(calibration: Calibration) -> Plan:
    return decide(PRESETS["W4A8"], calibration, KINDS, KEEP)


def test_a_plan_comes_back_as_it_went_out(plan: Plan, calibration: Calibration) -> None:
    for text in (json.dumps(plan.to_json()), json.dumps({"plan": plan.to_json(), "bytes": {}})):
        assert edited(plan, text, calibration, KEEP) == plan


def test_bits_alone(plan: Plan, calibration: Calibration) -> None:
    assert plan.layers["a"].weight_bits == plan.layers["conv"].weight_bits == 4
    changed = edited(plan, json.dumps({"layers": {"a": 8, "conv": 16}}), calibration, KEEP)
    assert (changed.layers["a"].weight_bits, changed.layers["a"].group) == (8, 0)
    assert "conv" not in changed.layers and changed.left["conv"] == "asked for in the plan"
    assert "asked for in the plan" in changed.reasons["a"]
    assert changed.layers["odd"] == plan.layers["odd"]
    back = edited(changed, json.dumps({"layers": {"conv": 4}}), calibration, KEEP)
    assert back.layers["conv"] == plan.layers["conv"] and "conv" not in back.left


def test_bits_changed_in_a_report_and_back(plan: Plan, calibration: Calibration) -> None:
    """A layer of a report names its group too, which goes with the bits."""
    data = plan.to_json()
    data["layers"]["a"]["weight_bits"] = 8
    eight = edited(plan, json.dumps(data), calibration, KEEP)
    assert (eight.layers["a"].weight_bits, eight.layers["a"].group) == (8, 0)
    back = eight.to_json()
    back["layers"]["a"]["weight_bits"] = 4
    assert edited(plan, json.dumps(back), calibration, KEEP).layers["a"] == plan.layers["a"]


def test_single_fields(plan: Plan, calibration: Calibration) -> None:
    text = json.dumps({"layers": {"a": {"weight_bits": 4, "group": 16, "activation": "static"}}})
    assert edited(plan, text, calibration, KEEP).layers["a"] == Scheme(4, 8, STATIC, group=16)
    text = json.dumps({"layers": {"a": {"weight_bits": 4, "activation": "none"}}})
    assert edited(plan, text, calibration, KEEP).layers["a"] == Scheme(4, 16, "none", group=32)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"b": 8}, "layer b, which this model does not have"),
        ({"a": 5}, "5 bits for layer a"),
        ({"a": True}, "True bits"),
        ({"a": "8"}, "'8' bits"),
        ({"kept": 8}, "layer kept, which stays in float .first layer"),
        ({"unseen": 4}, "never saw it run"),
        ({"odd": 4}, "groups of 0"),
        ({"a": {"weight_bits": 4, "group": 64}}, "groups of 64"),
        ({"conv": {"weight_bits": 4, "group": 48}}, "groups of 48"),
        ({"a": {"weight_bits": 8, "activation": "none", "weight_format": "nf4"}}, "4-bit weights"),
        ({"a": {"weight_bits": 4, "speed": 3}}, "field 'speed'"),
        ({"a": {"activation_bits": "8"}}, "activation_bits '8'"),
        ({"a": {"activation_bits": 1}}, "1 activation bits"),
        ({"a": {"activation": "later"}}, "activation 'later'"),
        ({"conv": {"activation": "dynamic"}}, "per token"),
        ({"conv": {"weight_format": "nf4"}}, "Linear"),
        ({"a": {"balanced": True}}, "balance"),
        ({"a": {"branches": 2}}, "two branches"),
        ({"a": {"rotation": 48}}, "blocks of 48"),
        ({"a": {"permuted": True}}, "permutations"),
        ({path: 16 for path in ("a", "conv", "odd")}, "every layer in float"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(plan: Plan, calibration: Calibration, layers: dict, message: str) -> None:
    with pytest.raises(TfmqError, match=message):
        edited(plan, json.dumps({"layers": layers}), calibration, KEEP)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"layers": [1]}', '{"plan": 4}', "null"])
def test_what_is_no_plan_is_refused(plan: Plan, calibration: Calibration, text: str) -> None:
    with pytest.raises(TfmqError, match="no JSON"):
        edited(plan, text, calibration, KEEP)
