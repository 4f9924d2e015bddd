"""Seconds in a real ComfyUI: pictures with and without quantization, and what calibrating and quantizing cost.

The UNets of bench/speed/unet.py with their random weights, loaded by the host, sampled by its KSampler from random
conditionings. Text encoder and VAE are not in it: they are the same for all.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.speed import unet
from bench.speed.networks import OURS
from devkit import inprocess

PROMPTS, STEPS, CFG = 2, 10, 7.0  # of the calibration; a picture has as many steps


def end_to_end(model: str, device: torch.device) -> dict[str, Any]:
    """`picture_s`: one picture of STEPS steps, without and with quantization, as the host computes on this device; on
    CPUs with bfloat16 instructions also behind the node ModelComputeDtype (bf16), and `ratio_bf16` for those.
    `generations`: what calibration and quantization take, over the time in which the float MODEL makes the pictures of
    the calibration's prompts (one is timed). Raises FileNotFoundError where there is no ComfyUI."""
    inprocess.use_host(device.type)
    pack = inprocess.load_pack().__name__
    from bench.quality.kept import calibrations_in

    calibrate = sys.modules[f"{pack}.tfmq.host.calibrate"]
    swap = sys.modules[f"{pack}.tfmq.host.quantize"]
    narrow = device.type == "cpu" and sys.modules[f"{pack}.tfmq.host.faster.precision"].fast_bfloat16()
    recipe = sys.modules[f"{pack}.tfmq.scheme"].PRESETS["W8A8"]
    config = unet.CONFIGS[model]
    patcher = _load(config, torch.bfloat16 if device.type == "cpu" else torch.float16)
    texts, empty = [_conditioning(config, seed) for seed in range(PROMPTS)], _conditioning(config, PROMPTS)
    latent = {"samples": torch.zeros(1, 4, config.latent, config.latent)}
    sampling = CFG, "euler", "normal"
    run = calibrate.ksampler_run(texts, empty, latent, 0, STEPS, *sampling)
    short = calibrate.ksampler_run(texts, empty, latent, 0, 1, *sampling)

    def picture(model: Any) -> float:
        short(model, 0, lambda *_: None)  # loads it, and packs the weights
        return _seconds(partial(run, model, 0, lambda *_: None))

    seconds = {"float": picture(patcher)}
    if narrow:
        seconds["bf16"] = picture(_in_bfloat16(patcher))
    print(model, seconds, flush=True)
    with tempfile.TemporaryDirectory() as folder, calibrations_in(Path(folder)):
        settings = calibrate.Settings((), {})
        started = time.perf_counter()
        handle, _ = calibrate.calibrate(patcher, run, PROMPTS, STEPS, 25, settings)
        calibrated = time.perf_counter()
        print(model, f"calibrated in {calibrated - started:.1f} s", flush=True)
        quantized = swap.quantize(patcher, handle.load(), recipe, lambda *_: None)
        ready = time.perf_counter()
    print(model, f"quantized in {ready - calibrated:.1f} s", flush=True)
    gc.collect()
    seconds[OURS] = picture(quantized)
    more = {}
    if narrow:
        seconds[f"{OURS}_bf16"] = picture(_in_bfloat16(quantized))
        more["ratio_bf16"] = seconds["bf16"] / seconds[f"{OURS}_bf16"]
    return {
        "steps": STEPS,
        "prompts": PROMPTS,
        "picture_s": seconds,
        "ratio": seconds["float"] / seconds[OURS],
        **more,
        "calibrate_s": calibrated - started,
        "quantize_s": ready - calibrated,
        "generations": (ready - started) / (PROMPTS * seconds["float"]),
    }


def _in_bfloat16(patcher: Any) -> Any:
    clone = patcher.clone()
    clone.set_model_compute_dtype(torch.bfloat16)
    return clone


def _load(config: unet.Config, dtype: torch.dtype) -> Any:
    import comfy.sd

    with torch.device("meta"):
        network = unet.UNetModel(config)
    network = network.to_empty(device="cpu").to(dtype)
    unet.fill(network)
    return comfy.sd.load_diffusion_model_state_dict(network.state_dict(), model_options={"dtype": dtype})


def _conditioning(config: unet.Config, seed: int) -> list[Any]:
    g = torch.Generator().manual_seed(seed)
    about = {"pooled_output": torch.randn(1, 1280, generator=g)} if config.pooled else {}
    return [[torch.randn(1, 77, config.context, generator=g), about]]


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
