"""Recipes that choose the bits of each layer: what each layer alone does to the prediction is measured, then a budget
is spent on it (`tfmq.decide.budget`)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
from comfy.patcher_extension import WrappersMP

from ..decide.budget import Option, fewest_bytes, least_error
from ..decide.candidates import scheme_of
from ..decide.plan import decide
from ..errors import TfmqError
from ..files import VERSION, read_manifest, write
from ..formats.int4 import GROUPS
from ..kernels.costs import Costs
from ..observe.calibration import Calibration
from ..observe.samples import Samples
from ..rounding.forwards import Forwards
from ..runtime.run_state import RunState
from ..scheme import Plan, Recipe, Scheme
from ..solve.layer import size_of, solve_layer
from .calibrate import FOLDER
from .call import ClockWrapper
from .leaf.leaf import make_leaf
from .network import Network
from .replay import replayed

FLOAT = 16
INTERVALS, ROWS = 6, 2  # intervals of the samples, and rows of each
MEGABYTE = 1e6
KIND = "sensitivity"


def mixed_plan(
    network: Network,
    calibration: Calibration,
    recipe: Recipe,
    keep: Mapping[str, str],
    costs: Costs,
    progress: Callable[[int, int], None],
) -> Plan:
    """Bits per layer from {4, 8, 16} under `recipe.budget` bytes of file, or for `recipe.quality` dB of the prediction.

    Where 4 bits in the recipe's groups are too large for the budget, larger groups are taken; the plan's recipe says
    which. keep: path -> why it must stay in float. costs: of the backend in use.
    progress: (done, total).
    Raises TfmqError where neither can be met (and names the nearest that can), or the calibration holds no samples.
    """
    eight = decide(replace(recipe, weight_bits=8), calibration, network.kinds, keep, costs)
    total = 2 * sum(p.numel() for p in network.module.parameters())
    rest = total - sum(2 * math.prod(calibration.layers[path].shape) for path in eight.layers)
    for group in (recipe.group, *(g for g in GROUPS if g > recipe.group)):
        recipe = replace(recipe, group=group)
        options = _options(calibration, recipe, eight, costs)
        smallest = rest + sum(
            min(2 * math.prod(layer.shape), *(size_of(scheme, layer) for scheme in options[path].values()))
            for path, layer in calibration.layers.items()
            if path in options
        )
        if smallest <= recipe.budget or not recipe.budget:
            break
    else:
        raise TfmqError(
            f"A size of {recipe.budget / MEGABYTE:.1f} MB cannot be met: the smallest that this model allows is "
            f"{smallest / MEGABYTE:.1f} MB; set size_mb to at least that."
        )
    asked = {path: {str(b): asdict(s) for b, s in schemes.items()} for path, schemes in options.items()}
    question = json.dumps([VERSION, calibration.model, calibration.settings, recipe.ranges, asked], default=str)
    choices = _kept(question, lambda: _measure(network, calibration, recipe, options, progress))
    plan = _solved(recipe, choices, rest)
    layers, reasons, left = {}, {}, dict(eight.left)
    for path, option in plan.items():
        told = ", ".join(f"{o.bits} bits {o.error:.1e}" for o in sorted(choices[path]) if o.bits != FLOAT)
        why = f"squared error of the prediction by this layer alone: {told}"
        if option.bits == FLOAT:
            left[path] = f"the budget allows it, and it is sensitive ({told})"
        else:
            layers[path], reasons[path] = options[path][option.bits], why
    if not layers:
        raise TfmqError(
            "With this size or quality every layer stays in float, and there is nothing to quantize: ask for a smaller "
            "size_mb or a lower quality_db."
        )
    return Plan(recipe, layers, reasons, left)


def _options(calibration: Calibration, recipe: Recipe, eight: Plan, costs: Costs) -> dict[str, dict[int, Scheme]]:
    """Path -> bits -> scheme. eight: the plan with 8 bits everywhere."""
    options: dict[str, dict[int, Scheme]] = {}
    for path, scheme in eight.layers.items():
        four, _ = scheme_of(replace(recipe, weight_bits=4), calibration.layers[path], 4, costs)
        options[path] = {8: scheme} if four.weight_bits != 4 else {8: scheme, 4: four}
    return options


def _solved(recipe: Recipe, choices: Mapping[str, list[Option]], rest: int) -> dict[str, Option]:
    """rest: bytes of what is not a choice."""
    if recipe.budget:
        plan = least_error(choices, recipe.budget - rest)
    else:
        plan = fewest_bytes(choices, 10 ** (-recipe.quality / 10))
    assert plan is not None  # the budget was looked at before, and float has no error
    return plan


def _kept(question: str, measure: Callable[[], dict[str, list[Option]]]) -> dict[str, list[Option]]:
    """Path -> options, from the file of an identical question or measured."""
    name = hashlib.sha256(question.encode()).hexdigest()[:24]
    path = Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{name}.safetensors"
    if path.exists():
        try:
            known = read_manifest(path, KIND)["choices"]
            return {layer: [Option(*option) for option in found] for layer, found in known.items()}
        except (TfmqError, KeyError, TypeError, AttributeError):
            pass  # damaged: measure anew
    found = measure()
    write(path, {}, {"kind": KIND, "choices": found})
    return found


def _measure(
    network: Network,
    calibration: Calibration,
    recipe: Recipe,
    options: Mapping[str, Mapping[int, Scheme]],
    progress: Callable[[int, int], None],
) -> dict[str, list[Option]]:
    samples = calibration.samples
    if samples is None or not samples.rows:
        raise TfmqError(
            "This calibration holds no samples, by which a recipe with bits per layer is measured: run TFMQ Calibrate "
            "again, without ControlNet."
        )
    weights = network.weights(options)
    clone = network.patcher.clone()
    clock = RunState(calibration.axis, calibration.partition)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "tfmq_clock", ClockWrapper(clock))
    batches = batches_of(samples)
    out: dict[str, list[Option]] = {}
    total, done = sum(len(schemes) for schemes in options.values()), 0
    with replayed(clone, samples) as replay:
        reference = [replay(batch).float() for batch in batches]
        energy = sum(float(r.cpu().double().square().sum()) for r in reference)
        for path, schemes in options.items():
            module, weight = network.layers[path], weights(path)
            out[path] = [Option(FLOAT, 2 * weight.numel(), 0.0)]
            for bits, scheme in schemes.items():
                comfy.model_management.throw_exception_if_processing_interrupted()
                state = solve_layer(scheme, calibration.layers[path], weight, recipe.ranges)
                kept = None if module.bias is None else module.bias.detach()
                leaf = make_leaf(module, state, network.geometries[path], clock, kept, module.weight.dtype)
                leaf.to(clone.load_device)
                with Forwards() as forwards:
                    forwards.replace(module, leaf)
                    error = sum(
                        float((replay(batch).float() - r).cpu().double().square().sum())
                        for batch, r in zip(batches, reference, strict=True)
                    )
                out[path].append(Option(bits, state.nbytes, error / max(energy, 1e-30)))
                done += 1
                progress(done, total)
    return out


def batches_of(samples: Samples) -> list[list[int]]:
    """Rows of some intervals spread over the time axis, one batch each: an interval has ranges of its own."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(samples.rows):
        groups.setdefault((row.interval, row.shape), []).append(i)
    intervals = sorted({interval for interval, _ in groups})
    chosen = {intervals[i * (len(intervals) - 1) // max(INTERVALS - 1, 1)] for i in range(INTERVALS)}
    largest: dict[int, list[int]] = {}
    for (interval, _), rows in groups.items():
        if interval in chosen and len(rows) > len(largest.get(interval, [])):
            largest[interval] = rows
    # Every k-th of an interval's rows, which lie in the order of the branches.
    return [rows[:: max(1, len(rows) // ROWS)][:ROWS] for _, rows in sorted(largest.items())]
