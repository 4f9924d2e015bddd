"""Reconstruction on the host's own models: the samples of a calibration are replayed and every architecture trains."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support import patchers, tiny

host = patchers.module("tfmq.host.rounding")
adaround = patchers.module("tfmq.rounding.adaround")
costs = patchers.module("tfmq.kernels.costs")
decide = patchers.module("tfmq.decide.plan")
networks = patchers.module("tfmq.host.network")
scheme = patchers.module("tfmq.scheme")
SHORT = adaround.Settings(iterations=3, scale_iterations=2, batch=4, rate=1e-3)


def calibrated(folder: Path, patcher: Any, of: tiny.Tiny, **options: Any) -> Any:
    positives = {f"positive{i}": patchers.conditioning(i, of) for i in range(4)}
    negative = patchers.conditioning(9, of)
    with patchers.files_in(folder):
        handle = patchers.calibrate(patcher, positives=positives, negative=negative, cfg=2.0, **options)
        return handle.load()


def planned(patcher: Any, calibration: Any) -> Any:
    network = networks.Network.of(patcher)
    recipe = scheme.Recipe("W4A8", weight_bits=4, group=32)
    return decide.decide(recipe, calibration, network.kinds, network.keep, costs.Costs(2.0))


def rounded(folder: Path, patcher: Any, calibration: Any, plan: Any, preset: str, **options: Any) -> Any:
    with patchers.files_in(folder), torch.inference_mode():
        return host.run(networks.Network.of(patcher), calibration, plan, {}, preset, lambda *_: None, **options)


@pytest.mark.parametrize("of", [tiny.FLUX, tiny.SD3, tiny.WAN], ids=lambda of: of.name)
def test_blocks_of_transformers_are_reconstructed(of: tiny.Tiny, tmp_path: Path) -> None:
    patcher = patchers.load(of)
    latent = {"samples": torch.zeros(1, 16, 1, 8, 8)} if of is tiny.WAN else {"samples": torch.zeros(1, 16, 8, 8)}
    calibration = calibrated(tmp_path, patcher, of, latent=latent)
    samples = calibration.samples
    assert len(samples.rows) == 24 and not samples.skipped  # 4 runs of 3 steps in 2 branches
    assert {row.branch for row in samples.rows} == {0, 1} and len({row.interval for row in samples.rows}) > 1
    plan = planned(patcher, calibration)
    before = patchers.weights(patcher)
    result = rounded(tmp_path, patcher, calibration, plan, "balanced", settings=SHORT)
    fours = {path for path, one in plan.layers.items() if one.weight_bits == 4}
    assert set(result.layers) == set(plan.layers) and result.losses
    assert {path for path, one in result.layers.items() if "loss" in one.note} == fours
    assert all(torch.equal(value, before[key]) for key, value in patchers.weights(patcher).items())
    assert not any("forward" in m.__dict__ for m in patcher.model.diffusion_model.modules())


def test_rounding_of_a_unet_on_replayed_samples(tmp_path: Path) -> None:
    patcher = patchers.load(tiny.SD15)
    calibration = calibrated(tmp_path, patcher, tiny.SD15)
    plan = planned(patcher, calibration)
    replay = patchers.module("tfmq.host.replay").Replay(patcher.clone(), calibration.samples)
    # A replayed call is the call: the float model answers as in the run.
    seen: list[torch.Tensor] = []
    original = patcher.model.diffusion_model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[0])
        return original(*args, **kwargs)

    patcher.model.diffusion_model.forward = spy
    try:
        with torch.inference_mode():
            replay([0, 1])
    finally:
        del patcher.model.diffusion_model.forward
    x, sigma, _ = calibration.samples.batch([0, 1])
    wanted = patcher.model.model_sampling.calculate_input(sigma, x)
    assert torch.allclose(seen[0], wanted)

    part = {path: one for path, one in plan.layers.items() if path.startswith("input_blocks.1.1")}
    fast = rounded(tmp_path, patcher, calibration, dataclasses.replace(plan, layers=part), "fast")
    assert set(fast.layers) == set(part)
    assert {one.note for one in fast.layers.values()} == {"error feedback"}
    quantities = [one.codes.float().mean() for one in fast.layers.values()]
    assert all(4 < float(q) < 11 for q in quantities)


def test_a_calibration_without_samples_is_refused_with_a_sentence(tmp_path: Path) -> None:
    patcher = patchers.load(tiny.FLUX)
    calibration = calibrated(tmp_path, patcher, tiny.FLUX, latent={"samples": torch.zeros(1, 16, 8, 8)})
    plan = planned(patcher, calibration)
    with pytest.raises(patchers.TfmqError, match=r"older TFMQ .* run TFMQ Calibrate again"):
        rounded(tmp_path, patcher, dataclasses.replace(calibration, samples=None), plan, "fast")
    none = dataclasses.replace(calibration.samples, rows=(), skipped={"ControlNet": 6})
    with pytest.raises(patchers.TfmqError, match=r"holds no samples.*ControlNet \(6 calls\)"):
        rounded(tmp_path, patcher, dataclasses.replace(calibration, samples=none), plan, "balanced")
    assert rounded(tmp_path, patcher, dataclasses.replace(calibration, samples=None), plan, "nearest").layers
    assert json.dumps(calibration.samples.tensors()[1])
