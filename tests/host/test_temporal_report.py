"""TFMQ Temporal Report, the choice of steps, and branches apart, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from support import patchers, tiny

report_nodes = patchers.module("tfmq.nodes.temporal")
look = patchers.module("tfmq.host.step_choice")
times = patchers.module("tfmq.observe.sampling_times")


@pytest.fixture(scope="module")
def report() -> tuple:
    with torch.inference_mode():
        return report_nodes.TemporalReport.execute(patchers.load(), 0, intervals=5, tiar_steps=0).args


def test_report_draws_and_tells(report: tuple) -> None:
    curves, ranges, text, numbers = report
    assert curves.dim() == 4 and curves.shape[-1] == 3 and torch.equal(curves, ranges)
    found = json.loads(numbers)
    assert found["bytes"] <= found["budget_bytes"]
    for path, choice in found["choices"].items():
        assert path in text and choice["why"] in text
    rel = found["curves"]["relative L2 error"]
    for path in found["choices"]:
        assert len(rel["int8 TIAR+FSC"][path]) == 5
        assert sum(rel["int8 TIAR+FSC"][path]) < sum(rel["int8 nearest"][path])


def test_calibration_adds_the_heat_map(tmp_path: Path) -> None:
    model = patchers.load()
    with patchers.files_in(tmp_path):
        handle = patchers.calibrate(model)
        with torch.inference_mode():
            out = report_nodes.TemporalReport.execute(model, 0, handle, intervals=5, tiar_steps=0).args
        layers = set(handle.load().layers)
    assert out[0].shape != out[1].shape
    assert set(json.loads(out[3])["activation_ranges"]) == layers


def test_model_whose_features_depend_on_more_is_told_so() -> None:
    with pytest.raises(patchers.TfmqError, match="TFMQ Temporal Cache"), torch.inference_mode():
        report_nodes.TemporalReport.execute(patchers.load(tiny.SDXL), 0, tiar_steps=0)


def test_budget_too_small_is_told_so() -> None:
    with pytest.raises(patchers.TfmqError, match="raise the budget"), torch.inference_mode():
        report_nodes.TemporalReport.execute(patchers.load(), 1, tiar_steps=0)


@pytest.mark.parametrize("rule", look.RULES)
def test_rules_look_at_their_steps(rule: str, tmp_path: Path) -> None:
    model = patchers.load()
    with patchers.files_in(tmp_path):
        learnt = patchers.calibrate(model, count=4, steps=8, intervals=8, look=rule).load()
    visited = torch.stack([s.histogram.sum(1) > 0 for s in learnt.layers.values()]).any(0)
    if rule == times.TRAJECTORY:
        assert int(visited.sum()) == 8 and "steps looked at" not in learnt.settings
    else:
        assert 1 <= int(visited.sum()) < 8 and learnt.settings["steps looked at"] == rule


def test_choice_follows_the_log_snr_of_a_flow_model() -> None:
    sampling = patchers.load(tiny.FLUX).get_model_object("model_sampling")
    choice = look.StepChoice(times.UNIFORM)
    sigmas = torch.linspace(1, 0, 21)
    seen = [bool(choice(sampling, sampling.timestep(s.reshape(1)), sigmas)) for s in sigmas[:-1]]
    assert 2 <= sum(seen) <= 10
    choice.start_run(1)
    assert [bool(choice(sampling, sampling.timestep(s.reshape(1)), sigmas)) for s in sigmas[:-1]] == seen


def test_branches_apart_use_their_own_grid(tmp_path: Path) -> None:
    """Conditional rows a hundred times as wide as unconditional ones: one grid for both would round the latter away."""
    model = patchers.load()
    loud = [[patchers.conditioning(0)[0][0] * 100, {}]]
    quiet = patchers.conditioning(5)
    options = {"positives": {"positive0": loud, "positive1": loud}, "negative": quiet, "cfg": 4.0}
    with patchers.files_in(tmp_path):
        learnt = patchers.calibrate(model, **options).load()
        apart = [path for path, s in learnt.layers.items() if s.branches is not None]
        assert any(path.endswith(("attn2.to_k", "attn2.to_v")) for path in apart)
        swap, scheme = patchers.module("tfmq.host.quantize"), patchers.module("tfmq.scheme")
        reference = patchers.sample(model, loud, negative=quiet, cfg=4.0)
        error = {}
        for together in (False, True):
            recipe = scheme.Recipe("W8A8", activations="static", branches_apart=not together)
            with torch.inference_mode():
                quantized = swap.quantize(model, learnt, recipe, lambda done, total: None)
            plan = quantized.attachments["tfmq"].plan
            assert all((plan.layers[path].branches == 2) is not together for path in apart)
            found = patchers.sample(quantized, loud, negative=quiet, cfg=4.0)
            error[together] = float((found - reference).norm() / reference.norm())
    assert error[False] < error[True]
