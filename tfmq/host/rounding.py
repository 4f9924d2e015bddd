"""Rounding of a MODEL's 4-bit weights on the samples of its calibration: what TFMQ Quantize does with `rounding`."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from torch import Tensor

from ..decide.grids import Grid, static_grid
from ..errors import TfmqError
from ..files import VERSION
from ..observe.calibration import Calibration
from ..observe.samples import Samples
from ..rounding.efforts import BALANCED, BEST_PLUS, EFFORTS, NEAREST
from ..rounding.finetune import finetune
from ..rounding.layer import Layer
from ..rounding.precision import product_dtype
from ..rounding.progress import PARTS, Progress
from ..rounding.reconstruct import Result, reconstruct
from ..scheme import INT, STATIC, Plan
from ..solve.layer import as_multiplied, as_multiplying, folded
from .calibrate import FOLDER
from .digest import update_digest
from .network import Network
from .replay import replayed
from .temporal.quantize import FLOAT

BALANCED_SHARE = 0.75  # of the time of best+, that is spent on balanced


def run(
    network: Network,
    calibration: Calibration,
    plan: Plan,
    grids: Mapping[str, Grid],
    preset: str,
    progress: Progress,
    folder: Path | None = None,
    **options: Any,
) -> Result:
    """Round the weights, those of 8 bits included, LoRA patches merged.

    grids: of static activations that are not found per interval (`decide.tdq`). preset: one of `EFFORTS`. progress:
    called with (done, total, seconds left). folder: where finished units are kept; by default beside the calibrations,
    in a place that belongs to this request. options: of `rounding.reconstruct`. The MODEL is unchanged on every way
    out. Raises TfmqError for a calibration without samples.
    "best+" is "balanced", whose finished units it shares, and fine-tuning behind it.
    """
    plus = preset == BEST_PLUS
    preset = BALANCED if plus else preset
    samples = calibration.samples
    if preset != NEAREST and (samples is None or not samples.rows):
        raise TfmqError(_without_samples(samples))
    layers = layers_of(network, calibration, plan, grids)
    weights = network.weights(layers)

    def weight(path: str) -> Tensor:
        found = weights(path)
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

    device = network.patcher.load_device
    dtype = product_dtype(device)
    if folder is None and EFFORTS[preset].value is not None:
        folder = _folder(calibration, plan, preset, dtype, options)
    with replayed(network.patcher.clone(), samples, load=preset != NEAREST, gradients=True) as replay:
        source, options = replay.source(), {"dtype": dtype} | options
        result = reconstruct(
            network.module, layers, weight, source, preset, device=device, progress=tell, folder=folder, **options
        )
        if plus:
            temporal = list(network.tib.layers) if plan.recipe.temporal == FLOAT else []
            tuned = finetune(
                network.module, layers, result.layers, source, device=device, temporal=temporal, progress=tell_tuning,
                dtype=options["dtype"],
            )  # fmt: skip
            logging.info("TFMQ: %s", tuned.note)
            result = replace(result, layers=tuned.layers, biases=tuned.biases, note=tuned.note)
    eights = {path: layer.weight8 for path, layer in layers.items() if layer.weight8 is not None}
    return replace(result, layers=result.layers | eights)


def layers_of(network: Network, calibration: Calibration, plan: Plan, grids: Mapping[str, Grid]) -> dict[str, Layer]:
    """The layers of the plan with integer weights, not rounded yet. grids: as in `run`."""
    device = network.patcher.load_device
    layers: dict[str, Layer] = {}
    for path, scheme in plan.layers.items():
        if scheme.weight_format != INT:
            continue
        layer = Layer(scheme, network.geometries[path])
        statistics = calibration.layers[path]
        bias = network.bias(path)
        layer.bias = None if bias is None else bias.float()
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


def _folder(calibration: Calibration, plan: Plan, preset: str, dtype: torch.dtype, options: dict[str, Any]) -> Path:
    words = f"{VERSION} {preset} {EFFORTS[preset].value} {dtype} {options} {calibration.model} {calibration.sampling}"
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
