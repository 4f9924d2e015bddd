"""The effort "best+": fine-tuning on replayed samples, its time embedding as patches, and the saved file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from support import patchers, tiny

driver = patchers.module("tfmq.rounding.reconstruct")
efforts = patchers.module("tfmq.rounding.efforts")
finetune = patchers.module("tfmq.rounding.finetune")
adaround = patchers.module("tfmq.rounding.adaround")
model = patchers.module("tfmq.host.model")
store = patchers.module("tfmq.host.store")
swap = patchers.module("tfmq.host.quantize")
network_of = patchers.module("tfmq.host.network").Network.of
require_quantized = patchers.module("tfmq.host.quantized").require_quantized
BALANCED = adaround.Settings(iterations=0, scale_iterations=2, batch=4, rate=1e-3)
RATES = {"activation_rate": 1e-3, "weight_rate": 1e-3, "bias_rate": 1e-3}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(efforts.EFFORTS, efforts.BALANCED, efforts.Choice("", BALANCED))
    few = dataclasses.replace(finetune.SETTINGS, iterations=4, every=2, **RATES)
    monkeypatch.setattr(finetune, "SETTINGS", few)


def calibrated(patcher: Any, of: tiny.Tiny, **options: Any) -> Any:
    positives = {f"positive{i}": patchers.conditioning(i, of) for i in range(4)}
    return patchers.calibrate(
        patcher, positives=positives, negative=patchers.conditioning(9, of), cfg=2.0, steps=2, **options
    )


def mostly_eight(patcher: Any) -> str:
    """A plan with 4 bits in one block alone, which takes a tenth of the time."""
    network = network_of(patcher)
    eight = [p for p in network.layers if p not in network.keep and not p.startswith("input_blocks.1.")]
    return json.dumps({"layers": dict.fromkeys(eight, 8)})


def test_a_fine_tuned_unet_is_saved_with_its_time_embedding(
    tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    patcher = patchers.load(tiny.SD15)
    # Four steps on an untrained network need not help: here every look is told to be better than the one before.
    looks = itertools.count()
    errors = finetune._Work._errors
    monkeypatch.setattr(finetune._Work, "_errors", lambda *args: errors(*args) * 0 + 0.5 ** next(looks))
    found: list[Any] = []
    original = swap.reconstruct
    monkeypatch.setattr(swap, "reconstruct", lambda *args: found.append(original(*args)) or found[-1])
    with patchers.files_in(tmp_path):
        handle = calibrated(patcher, tiny.SD15)
        before = patchers.weights(patcher)
        with torch.inference_mode():
            result = patchers.nodes.Quantize.execute(
                patcher, handle, "W4A8", effort="best+", plan=mostly_eight(patcher)
            )
        quantized, summary, report = result.args[:3]
        after = patchers.weights(patcher)
        assert all(torch.equal(value, before[key]) for key, value in after.items())
        assert not any("forward" in m.__dict__ for m in patcher.model.diffusion_model.modules())
        rounding = found[0]
        assert "fine-tuned" in rounding.note and rounding.note in summary
        assert json.loads(report)["plan"]["recipe"]["rounding"] == "best+"
        # The biases of the time embedding ride on the MODEL as patches, and only on the clone.
        plan = require_quantized(quantized).plan
        keys = {f"diffusion_model.{path}.bias" for path in rounding.biases if path not in plan.layers}
        assert keys and keys == set(quantized.patches) and not patcher.patches
        assert any("emb_layers" in key for key in keys) and any("time_embed" in key for key in keys)
        assert any(float(bias.abs().max()) > 0 for bias in rounding.biases.values())
        picture = patchers.sample(quantized)
        plain = quantized.clone()
        plain.patches, plain.patches_uuid = {}, uuid.uuid4()
        assert not torch.equal(patchers.sample(plain), picture)  # they take part
        with torch.inference_mode():
            loaded = store.load(store.save(quantized, "tuned"))
        assert torch.equal(patchers.sample(loaded), picture)


def test_an_interrupt_in_the_last_stage_leaves_the_model_as_it_was(tmp_path: Path, short: None) -> None:
    patcher = patchers.load(tiny.FLUX)
    host = patchers.module("tfmq.host.rounding")

    class Interrupted(BaseException):
        pass

    told: list[float] = []

    def stop(done: int, total: int, left: float) -> None:
        told.append(done / total)
        if done > 0.9 * total:
            raise Interrupted

    with patchers.files_in(tmp_path):
        handle = calibrated(patcher, tiny.FLUX, latent={"samples": torch.zeros(1, 16, 8, 8)})
        before = patchers.weights(patcher)
        recipe = dataclasses.replace(patchers.module("tfmq.scheme").PRESETS["W4A8"], rounding="best+")
        fast = dataclasses.replace(recipe, rounding="nearest")
        with torch.inference_mode():
            calibration = handle.load()
            plan = require_quantized(swap.quantize(patcher, calibration, fast, lambda *_: None)).plan
            with pytest.raises(Interrupted):
                host.run(network_of(patcher), calibration, plan, {}, "best+", stop)
    assert told == sorted(told) and all(0 <= share <= 1 for share in told)
    assert all(torch.equal(value, before[key]) for key, value in patchers.weights(patcher).items())
    assert not any("forward" in m.__dict__ for m in patcher.model.diffusion_model.modules())
    assert not model.comfy.model_management.in_training


def test_blocks_that_write_in_place_are_fine_tuned(tmp_path: Path, short: None) -> None:
    patcher = patchers.load(tiny.FLUX)
    with patchers.files_in(tmp_path):
        handle = calibrated(patcher, tiny.FLUX, latent={"samples": torch.zeros(1, 16, 8, 8)})
        quantized = patchers.quantize(patcher, handle, "W4A8", effort="best+")
    note = require_quantized(quantized).rounding
    assert "error of the prediction" in note or "balanced kept" in note
