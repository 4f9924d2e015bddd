"""Bits per layer: within the size, better than all layers alike, the same again, and the edited plan taken back."""

import json
from collections import Counter

import pytest
import torch

from support import patchers

bits = patchers.module("tfmq.host.bits")
summary = patchers.module("tfmq.host.summary")
UNDER, AT = "best under a size", "smallest at a quality"


@pytest.fixture(scope="module", autouse=True)
def few_samples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "INTERVALS", 2)
        patch.setattr(bits, "ROWS", 1)
        yield


def network_of(patcher):
    return {path: id(module) for path, module in patcher.model.diffusion_model.named_modules()}


def widths(patcher):
    return Counter(scheme.weight_bits for scheme in patcher.attachments["tfmq"].plan.layers.values())


def megabytes(patcher):
    """Of the file: what is not quantized has 16 bits."""
    leaves = patchers.leaves(patcher)
    total = 2 * sum(p.numel() for p in patcher.model.diffusion_model.parameters())
    for leaf in leaves.values():
        parts = leaf.weight.layout_cls.state_dict_tensors(leaf.weight._qdata, leaf.weight._params)
        tables = [t for t in (leaf.act_scale, leaf.act_zero_point) if t is not None]
        total += sum(t.nbytes for t in [*parts.values(), *tables]) - 2 * leaf.weight.numel()
    return total / 1e6


def test_a_size_is_kept_and_spent(base, calibration, monkeypatch):
    before, weights = network_of(base), patchers.weights(base)
    four, eight = patchers.quantize(base, calibration, "W4A8"), patchers.quantize(base, calibration)
    size = (megabytes(four) + megabytes(eight)) / 2
    mixed = patchers.quantize(base, calibration, UNDER, size_mb=size)
    assert 0.97 * size < megabytes(mixed) <= size * 1.0001
    assert widths(mixed)[4] and widths(mixed)[8]
    reference = patchers.sample(base)
    errors = [patchers.distance(patchers.sample(p), reference) for p in (eight, mixed, four)]
    assert errors[1] < errors[2]
    # `weights` takes the leaves out of the shared network first.
    assert all(torch.equal(value, weights[key]) for key, value in patchers.weights(base).items())
    assert network_of(base) == before
    # Another size is an answer from the file.
    monkeypatch.setattr(bits, "_measure", None)
    larger = patchers.quantize(base, calibration, UNDER, size_mb=size * 1.05)
    assert megabytes(larger) > megabytes(mixed)


def test_larger_groups_are_taken_before_a_size_is_refused(base, calibration):
    sizes = {group: megabytes(patchers.quantize(base, calibration, "W4A8", group=group)) for group in ("32", "64")}
    assert sizes["64"] < sizes["32"]
    mixed = patchers.quantize(base, calibration, UNDER, size_mb=(sizes["32"] + 3 * sizes["64"]) / 4)
    plan = mixed.attachments["tfmq"].plan
    assert plan.recipe.group == 64 and 64 in {scheme.group for scheme in plan.layers.values()}
    assert sizes["64"] * 0.999 < megabytes(mixed) < sizes["32"]


def test_a_quality_is_met_by_the_measured_errors(base, calibration):
    sizes = {}
    for decibels in (20.0, 40.0):
        mixed = patchers.quantize(base, calibration, AT, quality_db=decibels)
        errors = [why.split(": ")[1] for why in mixed.attachments["tfmq"].plan.reasons.values()]
        assert all("bits" in text for text in errors)
        sizes[decibels] = megabytes(mixed)
    assert sizes[20.0] < sizes[40.0]


def test_what_cannot_be_met_says_what_can(base, calibration):
    with pytest.raises(patchers.TfmqError, match=r"size of 0\.1 MB cannot be met: the smallest .* is \d+\.\d MB"):
        patchers.quantize(base, calibration, UNDER, size_mb=0.1)
    with pytest.raises(patchers.TfmqError, match="every layer stays in float"):
        patchers.quantize(base, calibration, UNDER, size_mb=1e5)
    with pytest.raises(patchers.TfmqError, match="set size_mb"):
        patchers.quantize(base, calibration, UNDER)


def test_the_report_comes_back_as_a_plan(base, calibration):
    with torch.inference_mode():
        first, _, report = patchers.nodes.Quantize.execute(base, calibration, "W4A8").args
    again = patchers.quantize(base, calibration, "W4A8", plan=report)
    plan = first.attachments["tfmq"].plan
    assert again.attachments["tfmq"].plan == plan
    assert torch.equal(patchers.sample(again), patchers.sample(first))
    data = json.loads(report)
    path = next(iter(data["plan"]["layers"]))
    data["plan"]["layers"][path] = 8
    changed = patchers.quantize(base, calibration, "W4A8", plan=json.dumps(data)).attachments["tfmq"].plan
    assert {p for p, s in changed.layers.items() if s != plan.layers[p]} == {path}
    assert changed.layers[path].weight_bits == 8
    with pytest.raises(patchers.TfmqError, match="layer nowhere, which this model does not have"):
        patchers.quantize(base, calibration, "W4A8", plan='{"layers": {"nowhere": 4}}')


def some_in_eight(base, calibration):
    """Changes to the plan of W4A8, and the layers that they leave in 8 bits."""
    data = json.loads(patchers.nodes.Quantize.execute(base, calibration, "W4A8").args[2])
    names = list(data["plan"]["layers"])[::3]
    data["plan"]["layers"] |= dict.fromkeys(names, 8)
    return json.dumps(data), names


def test_a_weight_of_8_bits_is_rounded_once(base, monkeypatch):
    calibration = patchers.calibrate(base, positives={f"positive{i}": patchers.conditioning(i) for i in range(4)})
    gptq8 = patchers.module("tfmq.solve.gptq8")
    changes, names = some_in_eight(base, calibration)
    calls, compensated = [], gptq8.compensated
    monkeypatch.setattr(gptq8, "compensated", lambda *about: calls.append(about) or compensated(*about))
    codes = {}
    for effort in ("nearest", "fast"):
        made = patchers.quantize(base, calibration, "W4A8", plan=changes, effort=effort)
        assert len(calls) == widths(made)[8] >= len(names)
        calls.clear()
        codes[effort] = {path: leaf.weight._qdata for path, leaf in patchers.leaves(made).items()}
        wide = [path for path, leaf in patchers.leaves(made).items() if leaf.scheme.weight_bits == 8]
    assert all(torch.equal(codes["nearest"][path], codes["fast"][path]) for path in wide)
    assert not all(torch.equal(codes["nearest"][path], codes["fast"][path]) for path in codes["fast"])


def test_rounding_sees_the_8_bit_weights_that_the_model_gets(base, calibration):
    reconstruct = patchers.module("tfmq.host.rounding")
    solve = patchers.module("tfmq.solve.layer")
    changes, names = some_in_eight(base, calibration)
    with torch.inference_mode():
        mixed = patchers.quantize(base, calibration, "W4A8", plan=changes)
        read, plan = calibration.load(), mixed.attachments["tfmq"].plan
        network = patchers.module("tfmq.host.network").Network.of(base)
        layers = reconstruct.layers_of(network, read, plan, {})
        for name in names:
            layer, weight = layers[name], network.layers[name].weight
            layer.round_to_8_bits(solve.as_multiplied(plan.layers[name], read.layers[name], weight.float()))
            assert layer.sample is not None
            found = patchers.module("tfmq.host.leaf.layout").codes_of(patchers.leaves(mixed)[name].weight._qdata)
            assert torch.equal(layer.weight8.codes, found)
