"""What does a range that follows time buy? One static range, one per interval, TDQ, and one per token, at 8 and 6 bits.

The grids are learnt on some prompts; layer errors are measured on others, pictures on a third set. Weights are int8
throughout; the 6-bit codes of the activations are real ones (0 .. 63), multiplied by the 8-bit kernels.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import torch

from bench.temporal_error import adherence_of
from demo import checkpoint as demo_checkpoint
from devkit import inprocess

PICTURES, CALIBRATION, HELD_OUT = 12, 8, 4
INTERVALS = 25
BITS = (8, 6)


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
    from tfmq.report import metrics

    from .quality import DEMO, Setting, calibrate, encode, finite, load, read_prompts, sample, say

    # The classes of the pack as the host knows it: a second import of `tfmq` would have classes of its own.
    tdq, swap, scheme = (_module(pack, name) for name in ("decide.tdq", "host.quantize", "scheme"))
    model, clip, vae = load(checkpoint or demo_checkpoint.ensure())
    texts = read_prompts(prompts or Path(__file__).resolve().parent.parent / "demo" / "prompts.txt")
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
        errors = tdq.compare(
            layers, tdq.fit(layers, calibration.partition, bits), calibration.partition, bits, judge=judge["layers"]
        )
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


def _module(pack: ModuleType, name: str) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.tfmq.{name}")


def _held_out(pack: ModuleType, model: Any, calibration: Any, setting: Any, conditionings: list[Any]) -> dict[str, Any]:
    """Statistics of other prompts, on the balance vectors and histogram bins of the calibration."""
    from comfy.patcher_extension import WrappersMP

    from .quality import CALIBRATION_SEED, empty_latent

    calibrating, network, observe, timeline, clocks = (
        _module(pack, name) for name in ("host.calibrate", "host.network", "observe.model", "timeline", "host.call")
    )
    clock = timeline.Clock(calibration.axis, calibration.partition)
    modules = network.Network.of(model).layers
    observer = observe.ModelObserver([(p, m) for p, m in modules.items() if p in calibration.layers], clock)
    for path, own in observer.observers.items():
        known = calibration.layers[path]
        own.balance, own.bin_low, own.bin_high = known.balance, known.bin_low.clone(), known.bin_high.clone()
        own.histogram = torch.zeros(
            _module(pack, "runtime.branches").BRANCHES, *known.histogram.shape, dtype=torch.int64
        )
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
    grids, tdq, times = (_module(pack, name) for name in ("decide.grids", "decide.tdq", "observe.sampling_times"))
    sampling = model.get_model_object("model_sampling")
    edges = torch.tensor([0.0, *calibration.partition.edges, 1.0]) * 999
    points = torch.arange(1000).float()
    log_snr = -2 * sampling.sigma(points).log()
    wanted = {
        times.UNIFORM: times.uniform_log_snr(1024, points, log_snr),
        times.NDTC: times.ndtc(1024, 0.0, 999.0),
    }
    weights = {times.TRAJECTORY: None} | {rule: times.interval_weights(t, edges) for rule, t in wanted.items()}
    found = {}
    for rule, weight in weights.items():
        errors = [
            grids.grid_error(judge[p], tdq.one_grid(s, "mse", 8, weight))
            for p, s in calibration.layers.items()
            if p in judge and not s.vector
        ]
        found[rule] = fmean(errors)
    return found


if __name__ == "__main__":
    json.dump(ranges(), sys.stdout, indent=1)
