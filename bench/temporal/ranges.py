"""What does a range that follows time buy? One static range, one per interval, TDQ, and one per token, at 8 and 6 bits.

The grids are learnt on some prompts; layer errors are measured on others, pictures on a third set. Weights are int8
throughout; the 6-bit codes of the activations are real ones (0 .. 63), multiplied by the 8-bit kernels.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.temporal.error import adherence_of
from demo import checkpoint as demo_checkpoint
from devkit import inprocess
from tfmq.decide.candidates import dynamic_error
from tfmq.decide.grids import grid_error, static_grid
from tfmq.decide.tdq import TimeRanges, one_grid
from tfmq.observe.statistics import LayerStatistics

PICTURES, CALIBRATION, HELD_OUT = 12, 8, 4
INTERVALS = 25
BITS = (8, 6)


@dataclass(frozen=True)
class RangeErrors:
    """Relative L2 error of one layer's input under each way to choose its range; per_token is None for convolutions."""

    one: float
    intervals: float
    tdq: float
    per_token: float | None

    @property
    def best_static(self) -> str:
        """ "one", "intervals" or "tdq"."""
        return min(("one", "intervals", "tdq"), key=lambda name: getattr(self, name))


@torch.inference_mode()  # as in the host
def ranges(checkpoint: Path | None = None, prompts: Path | None = None, pictures: int = PICTURES) -> dict[str, Any]:
    """Bits -> entry -> `layer_error` (mean relative L2 of the inputs of all quantized layers, held-out prompts),
    `layer_error_linear` (the same over Linear layers alone), `psnr_db` against float32 and `adherence`
    (`float32` has that of the reference).

    Entries: `one_range`, `intervals_25`, `tdq`, `per_token`. Per token exists for Linear layers alone: its convolutions
    have a range per interval. Also `better_with_tdq`: in how many layers TDQ has the least error of the static three,
    `layers`: all errors, and `sampling`: one static range learnt where each sampling rule looks, on the same held-out
    prompts.
    """
    inprocess.use_host()
    pack = inprocess.load_pack()
    from bench.quality.run import finite
    from bench.quality.sampling import DEMO, PROMPTS, Setting, calibrate, encode, load, read_prompts, sample, say
    from tfmq.report import metrics

    # The classes of the pack as the host knows it: a second import of `tfmq` would have classes of its own.
    tdq, swap, scheme = (_module(pack, name) for name in ("decide.tdq", "host.quantize", "scheme"))
    model, clip, vae = load(checkpoint or demo_checkpoint.ensure())
    texts = read_prompts(prompts or PROMPTS)
    wanted = texts[:pictures]
    rest = texts[pictures:] or wanted
    encoded = {text: encode(clip, text) for text in [*wanted, *rest[-CALIBRATION - HELD_OUT :]]}
    negative = encode(clip, "")
    how: dict[str, Any] = dict(DEMO)
    setting = Setting(wanted, [encoded[t] for t in wanted], negative, how["steps"], how["cfg"], how["size"], vae)
    calibration = calibrate(pack, model, setting, [encoded[t] for t in rest[-CALIBRATION:]])
    say(f"ranges: calibrated on {CALIBRATION} prompts")
    judge = _held_out(
        pack, model, calibration, setting, [encoded[t] for t in rest[-CALIBRATION - HELD_OUT : -CALIBRATION]]
    )
    reference = sample(model, setting)
    result: dict[str, Any] = {
        "prompts": {"calibration": CALIBRATION, "held_out": len(judge["prompts"]), "pictures": len(wanted)},
        "partition": INTERVALS,
        "float32": adherence_of(reference, wanted, checkpoint),
    }
    recipes = {
        "one_range": {"activations": "static", "ranges": scheme.ONE_RANGE},
        "intervals_25": {"activations": "static"},
        "tdq": {"activations": "static", "ranges": scheme.TDQ},
        "per_token": {"activations": "dynamic"},
    }
    for bits in BITS:
        found: dict[str, Any] = {}
        plan = None
        for name, wishes in recipes.items():
            recipe = scheme.Recipe(f"W8A{bits}", 8, bits, branches_apart=False, **wishes)
            quantized = swap.quantize(model, calibration, recipe, lambda *_: None)
            plan = _module(pack, "host.quantized").require_quantized(quantized).plan
            made = sample(quantized, setting)
            found[name] = {"psnr_db": finite(metrics.psnr(reference, made)), **adherence_of(made, wanted, checkpoint)}
            say(f"ranges: {bits} bits, {name}: {found[name]['psnr_db']} dB")
        assert plan is not None
        layers = {p: calibration.layers[p] for p in plan.layers}
        learnt = tdq.fit(layers, calibration.partition, bits)
        errors = compare(layers, learnt, calibration.partition.centers, bits, judge["layers"])
        linear = [p for p in errors if layers[p].kind == "linear"]
        columns = {"one_range": "one", "intervals_25": "intervals", "tdq": "tdq", "per_token": "per_token"}
        for name, column in columns.items():
            values = {p: getattr(e, column) for p, e in errors.items()}
            values = {p: errors[p].intervals if v is None else v for p, v in values.items()}
            found[name]["layer_error"] = fmean(values.values())
            found[name]["layer_error_linear"] = fmean(values[p] for p in linear)
        found["better_with_tdq"] = sum(e.best_static == "tdq" for e in errors.values())
        found["layers"] = {p: asdict(e) for p, e in errors.items()}
        result[f"{bits} bits"] = found
    result["sampling"] = _sampling_rules(pack, model, calibration, judge["layers"])
    return result


def compare(
    layers: Mapping[str, LayerStatistics],
    ranges: TimeRanges,
    centers: tuple[float, ...],
    bits: int,
    judge: Mapping[str, LayerStatistics],
) -> dict[str, RangeErrors]:
    """Path -> errors of the four ways on `judge`, all learnt from `layers`.

    centers: of the intervals of `layers`. judge: statistics with the same balance vectors; on `layers` itself the
    errors flatter the ways with the most freedom.
    """
    learnt = ranges.table(torch.tensor(centers), bits)
    return {
        path: RangeErrors(
            grid_error(judge[path], one_grid(layers[path], bits=bits), bits),
            grid_error(judge[path], static_grid(layers[path], "mse", bits), bits),
            grid_error(judge[path], learnt[path], bits),
            dynamic_error(judge[path], bits) if layers[path].kind == "linear" else None,
        )
        for path in ranges.paths
        if path in judge
    }


def _module(pack: ModuleType, name: str) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.tfmq.{name}")


def _held_out(pack: ModuleType, model: Any, calibration: Any, setting: Any, conditionings: list[Any]) -> dict[str, Any]:
    """Statistics of other prompts, on the balance vectors and histogram bins of the calibration."""
    from comfy.patcher_extension import WrappersMP

    from bench.quality.sampling import CALIBRATION_SEED, empty_latent

    calibrating, network, observe, timeline, clocks = (
        _module(pack, name) for name in ("host.calibrate", "host.network", "observe.model", "timeline", "host.call")
    )
    branches = _module(pack, "runtime.branches")
    clock = timeline.Clock(calibration.axis, calibration.partition)
    modules = network.Network.of(model).layers
    observer = observe.ModelObserver([(p, m) for p, m in modules.items() if p in calibration.layers], clock)
    for path, own in observer.observers.items():
        known = calibration.layers[path]
        own.balance, own.bin_low, own.bin_high = known.balance, known.bin_low.clone(), known.bin_high.clone()
        own.histogram = torch.zeros(branches.BRANCHES, *known.histogram.shape, dtype=torch.int64)
    clone = model.clone()

    def watch(executor: Any, x: Any, sigma: Any, *args: Any, **kwargs: Any) -> Any:
        observer.start_call(clocks.timesteps(executor, sigma))
        return executor(x, sigma, *args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "tfmq_judge", watch)
    run = calibrating.ksampler_run(
        conditionings, setting.negative, empty_latent(setting.size), 2 * CALIBRATION_SEED, setting.steps, setting.cfg,
        "euler", "normal",
    )  # fmt: skip
    with observer:
        for number in range(len(conditionings)):
            run(clone, number, lambda *_: None)
    return {"layers": observer.statistics(), "prompts": conditionings}


def _sampling_rules(pack: ModuleType, model: Any, calibration: Any, judge: Any) -> dict[str, float]:
    """Rule -> mean layer error of one static 8-bit range that was learnt from the intervals where the rule looks."""
    times = _module(pack, "observe.sampling_times")
    sampling = model.get_model_object("model_sampling")
    edges = torch.tensor([0.0, *calibration.partition.edges, 1.0]) * 999
    points = torch.arange(1000).float()
    log_snr = -2 * sampling.sigma(points).log()
    wanted = {
        times.UNIFORM: times.uniform_log_snr(1024, points, log_snr),
        times.NDTC: times.ndtc(1024, 0.0, 999.0),
    }
    weights = {times.TRAJECTORY: None} | {rule: interval_weights(t, edges) for rule, t in wanted.items()}
    found = {}
    for rule, weight in weights.items():
        errors = [
            grid_error(judge[p], one_grid(s if weight is None else weighted(s, weight)))
            for p, s in calibration.layers.items()
            if p in judge and not s.vector
        ]
        found[rule] = fmean(errors)
    return found


def interval_weights(wanted: Tensor, edges: Tensor) -> Tensor:
    """Share of the wanted timesteps in each interval: edges [I + 1], ascending -> float64 [I], sum 1."""
    inner = edges[1:-1].to(wanted.dtype)
    counts = torch.bincount(torch.bucketize(wanted, inner, right=True), minlength=edges.numel() - 1)
    return counts.double() / counts.sum().clamp_min(1)


def weighted(statistics: LayerStatistics, weights: Tensor) -> LayerStatistics:
    """The statistics with the intervals counted as `weights` [I] says (the density of a calibration's timesteps)."""
    counts = statistics.histogram.double()
    counts = counts / counts.sum(1, keepdim=True).clamp_min(1) * weights.double().unsqueeze(1)
    counts = counts / counts[counts > 0].min().clamp_min(1e-9) if bool((counts > 0).any()) else counts
    return replace(statistics, histogram=counts)
