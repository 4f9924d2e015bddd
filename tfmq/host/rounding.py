"""Rounding of a MODEL's 4-bit weights on the samples of its calibration: what TFMQ Quantize does with `rounding`."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import copy_nested_dicts
from torch import Tensor

from ..decide.grids import static_grid
from ..decide.tdq import over_time
from ..errors import TfmqError
from ..files import VERSION
from ..geometry import Geometry, geometry_of
from ..observe.calibration import Calibration
from ..observe.samples import Samples
from ..rounding import reconstruct as driver
from ..rounding.finetune import finetune
from ..rounding.layer import Layer
from ..rounding.precision import product_dtype
from ..rounding.progress import PARTS
from ..scheme import INT, STATIC, Plan
from ..solve.layer import as_multiplied, as_multiplying, folded
from ..temporal.tib import find_tib
from .calibrate import FOLDER
from .digest import update_digest
from .model import PREFIX, candidates, float_weight, release
from .temporal.quantize import FLOAT

Progress = Callable[[int, int, float], None]
BALANCED_SHARE = 0.75  # of the time of best+, that is spent on balanced


def run(
    patcher: ModelPatcher,
    calibration: Calibration,
    plan: Plan,
    preset: str,
    progress: Progress,
    folder: Path | None = None,
    **options: Any,
) -> driver.Result:
    """Round the weights, those of 8 bits included, LoRA patches merged.

    preset: one of `ROUNDINGS`. progress: called with (done, total, seconds left). folder: where
    finished units are kept; by default beside the calibrations, in a place that belongs to this request. options: of
    `rounding.reconstruct`. The MODEL is unchanged on every way out. Raises TfmqError for a calibration without samples.
    "best+" is "balanced", whose finished units it shares, and fine-tuning behind it.
    """
    plus = preset == driver.BEST_PLUS
    preset = driver.BALANCED if plus else preset
    samples = calibration.samples
    if preset != driver.NEAREST and (samples is None or not samples.rows):
        raise TfmqError(_without_samples(samples))
    device = patcher.load_device
    layers = layers_of(patcher, calibration, plan)

    # Once the model is loaded, its own weights hold the patches already.
    patched = {
        path: float_weight(patcher, key).cpu()
        for path in layers
        if (key := f"{PREFIX}{path}.weight") in patcher.patches
    }

    def weight(path: str) -> Tensor:
        found = patched.get(path)
        found = float_weight(patcher, f"{PREFIX}{path}.weight") if found is None else found.to(device)
        if not bool(torch.isfinite(found).all()):
            raise TfmqError(
                f"Layer {path} cannot be quantized: the weight holds NaN or infinite values; load an intact copy of "
                "the model."
            )
        return as_multiplied(plan.layers[path], calibration.layers[path], found)

    began, share = time.monotonic(), BALANCED_SHARE if plus else 1.0

    def tell(done: int, total: int, left: float) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        later = (time.monotonic() - began + left) * (1 / share - 1)  # what comes behind it
        progress(int(done * share), total, left + later)

    def tell_tuning(done: int, total: int, left: float) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress(int(PARTS * (share + (1 - share) * done / total)), PARTS, left)

    dtype = product_dtype(device)
    if folder is None and preset in driver.SETTINGS:
        folder = _folder(calibration, plan, preset, dtype, options)
    network = patcher.model.diffusion_model
    with _replayed(patcher, samples, load=preset != driver.NEAREST) as replay:
        source, options = replay.source(), {"dtype": dtype} | options
        result = driver.reconstruct(
            network, layers, weight, source, preset, device=device, progress=tell, folder=folder, **options
        )
        if plus:
            tuned = finetune(
                network, layers, result.layers, source, device=device, temporal=_temporal(patcher, plan),
                progress=tell_tuning, dtype=options["dtype"],
            )  # fmt: skip
            logging.info("TFMQ: %s", tuned.note)
            result = replace(result, layers=tuned.layers, biases=tuned.biases, note=tuned.note)
    eights = {path: layer.weight8 for path, layer in layers.items() if layer.weight8 is not None}
    return replace(result, layers=result.layers | eights)


@contextmanager
def _replayed(patcher: ModelPatcher, samples: Samples | None, load: bool) -> Iterator[Replay]:
    """The samples and the MODEL to run them, loaded, with attention that has a gradient."""
    clone = patcher.clone()
    replay = Replay(clone, samples)
    if load:
        comfy.model_management.load_models_gpu([clone])
    clone.pre_run()
    # Some of the host's kernels have no gradient; while this is set it takes others.
    training = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield replay
    finally:
        comfy.model_management.in_training = training
        clone.cleanup()
        release(patcher)


def _temporal(patcher: ModelPatcher, plan: Plan) -> list[str]:
    """Layers whose output depends on the timestep alone, where they stay in float."""
    if plan.recipe.temporal != FLOAT:
        return []
    return list(find_tib(patcher.model.diffusion_model).layers)


def layers_of(patcher: ModelPatcher, calibration: Calibration, plan: Plan) -> dict[str, Layer]:
    """The layers of the plan with integer weights, not rounded yet."""
    modules = candidates(patcher.model.diffusion_model)
    device = patcher.load_device
    grids = over_time(plan, calibration)
    layers: dict[str, Layer] = {}
    for path, scheme in plan.layers.items():
        geometry = geometry_of(modules[path])
        if scheme.weight_format != INT or not isinstance(geometry, Geometry):
            continue
        layer = Layer(scheme, geometry)
        statistics = calibration.layers[path]
        if modules[path].bias is not None:
            layer.bias = float_weight(patcher, f"{PREFIX}{path}.bias").float()
        if scheme.activation == STATIC:
            found = grids.get(path) or static_grid(
                statistics.under(scheme), plan.recipe.ranges, scheme.activation_bits, scheme.branches
            )
            layer.act_scale, layer.act_zero_point = found[0].to(device), found[1].to(device)
        layer.balance, layer.permutations = (
            None if part is None else part.to(device) for part in folded(scheme, statistics)
        )
        if scheme.weight_bits == 8:
            layer.sample = as_multiplying(scheme, statistics)
        layers[path] = layer
    return layers


class Replay:
    """Runs the float MODEL on rows of the samples."""

    def __init__(self, patcher: ModelPatcher, samples: Samples | None) -> None:
        self.patcher, self.samples = patcher, samples or Samples(())
        options = create_model_options_clone(patcher.model_options)["transformer_options"]
        options["wrappers"] = copy_nested_dicts(patcher.wrappers)
        options["callbacks"] = copy_nested_dicts(patcher.callbacks)
        # The host's other attentions are not all made for gradients.
        options["optimized_attention_override"] = lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)
        self.options = options

    def __call__(self, indices: list[int]) -> Tensor:
        """What the MODEL predicts for these rows, [B, ...]."""
        device = self.patcher.load_device
        x, sigma, conditions = self.samples.batch(indices)
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in conditions.items()}
        sigma = sigma.to(device)
        options = {
            **copy_nested_dicts(self.options),
            "cond_or_uncond": [self.samples.rows[i].branch for i in indices],
            "sigmas": sigma,
        }
        return self.patcher.model.apply_model(x.to(device), sigma, transformer_options=options, **moved)

    def source(self) -> driver.Source:
        rows = self.samples.rows
        return driver.Source(
            self,
            torch.tensor([row.interval for row in rows], dtype=torch.int64),
            torch.tensor([row.branch for row in rows], dtype=torch.int64),
            [row.run for row in rows],
            [row.shape for row in rows],
        )


def _folder(calibration: Calibration, plan: Plan, preset: str, dtype: torch.dtype, options: dict[str, Any]) -> Path:
    words = f"{VERSION} {preset} {driver.SETTINGS[preset]} {dtype} {options} {calibration.model} {calibration.sampling}"
    digest = hashlib.sha256(words.encode())
    digest.update(json.dumps({path: asdict(scheme) for path, scheme in plan.layers.items()}).encode())
    digest.update(json.dumps([plan.recipe.ranges, calibration.settings], default=str).encode())
    assert calibration.samples is not None
    for row in calibration.samples.rows:
        update_digest(digest, (row.x, row.sigma, row.run))
    for statistics in calibration.layers.values():
        update_digest(digest, (statistics.low, statistics.high, statistics.balance, statistics.permutations))
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / "rounding" / digest.hexdigest()[:24]


def _without_samples(samples: Samples | None) -> str:
    if samples is None:
        return (
            "This calibration was made by an older TFMQ and holds no samples, which an effort above nearest needs: run "
            "TFMQ Calibrate again, or set effort to nearest."
        )
    reasons = ", ".join(f"{reason} ({count} calls)" for reason, count in samples.skipped.items()) or "no call was seen"
    return (
        f"This calibration holds no samples, which an effort above nearest needs: {reasons}. Calibrate without that, "
        "or set effort to nearest."
    )
