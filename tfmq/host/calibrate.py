"""Calibration in the graph: the person's own sampler runs on their own prompts while the observers watch."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..errors import TfmqError
from ..files import VERSION, read_calibration, write_calibration
from ..observe.calibration import Calibration
from ..observe.model import ModelObserver
from ..observe.samples import Collector
from ..observe.sampling_times import TRAJECTORY
from ..timeline import Clock, Partition
from ..words import counted
from .call import branches, sample_sigmas, timesteps
from .digest import update_digest
from .model import fingerprint, sampling_kind, sampling_values, time_axis
from .network import Network
from .step_choice import StepChoice

FOLDER = "tfmq_calibrations"
MAX_FIRST_STAGE = 8
folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


@dataclass(frozen=True)
class CalibrationHandle:
    """What travels along the link: where the calibration lies. The host may drop a graph's results at any time."""

    path: str

    def load(self) -> Calibration:
        return read_calibration(Path(self.path))


@dataclass(frozen=True)
class Settings:
    """The sampling set-up of a calibration; `identity` is hashed, `text` is for people."""

    identity: tuple[Any, ...]
    text: dict[str, Any]


# Samples one prompt with the given clone: (clone, number of the prompt, callback of the sampler).
Run = Callable[[ModelPatcher, int, Callable[..., None]], None]


def calibrate(
    patcher: ModelPatcher,
    run: Run,
    prompts: int,
    steps: int,
    intervals: int,
    settings: Settings,
    look: str = TRAJECTORY,
) -> tuple[CalibrationHandle, bool]:
    """Calibrate, or find the sidecar of an identical request. Returns the handle and whether it was there already.

    look: which steps of a run the observers see, one of `step_choice.RULES`.
    The MODEL is unchanged on every way out, interrupt included. Raises TfmqError for anything the person can mend.
    """
    network = Network.of(patcher)
    model = fingerprint(patcher)
    partition = Partition.uniform(intervals)
    digest = hashlib.sha256(f"{VERSION} {model} {intervals} {prompts} {look} {sampling_kind(patcher)}".encode())
    update_digest(digest, (settings.identity, sampling_values(patcher), patcher.model_options))
    path = Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{digest.hexdigest()[:24]}.safetensors"
    if path.exists():
        try:
            read_calibration(path)
            return CalibrationHandle(str(path)), True
        except TfmqError:
            pass  # damaged: make it anew

    clock = Clock(time_axis(patcher), partition)
    unseen = {*network.tib.layers, *network.ends}
    observer = ModelObserver([(p, m) for p, m in network.layers.items() if p not in unseen], clock)
    clone = patcher.clone()
    seen = StepChoice(look)
    collector = Collector()

    def watch(executor: Any, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Any:
        t = timesteps(executor, sigma)
        observer.start_call(t, branches(args, kwargs))
        observer.active = seen(executor.class_obj.model_sampling, t, sample_sigmas(args, kwargs))
        if observer.active:
            _collect(collector, x, sigma, args, kwargs, observer, seen.run)
        return executor(x, sigma, *args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "tfmq_observe", watch)
    first = min(MAX_FIRST_STAGE, -(-prompts // 4))
    # A single prompt is run twice: each stage needs one.
    order = [*range(first), *range(first if prompts > 1 else 0, prompts)]
    progress = _Progress(patcher, len(order), steps)
    with observer:
        for place, prompt in enumerate(order):
            if place == first:
                observer.end_first_stage()
            comfy.model_management.throw_exception_if_processing_interrupted()
            seen.start_run(prompt)
            run(clone, prompt, progress.callback(place))
    layers = observer.statistics()
    if not layers:
        raise TfmqError(
            "The calibration saw no Linear or Conv2d layer run: this model computes with layers that TFMQ does not "
            "know, so use it without TFMQ."
        )
    about = settings.text if look == TRAJECTORY else {**settings.text, "steps looked at": look}
    result = Calibration(model, sampling_kind(patcher), clock.axis, partition, layers, about, collector.samples())
    write_calibration(path, result)
    return CalibrationHandle(str(path)), False


def _collect(
    collector: Collector, x: Tensor, sigma: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any],
    observer: ModelObserver, prompt: int,
) -> None:  # fmt: skip
    """Offer a call to the samples. args, kwargs: of `apply_model` behind x and sigma."""
    given = {**dict(zip(("c_concat", "c_crossattn", "control", "transformer_options"), args, strict=False)), **kwargs}
    given.pop("transformer_options", None)
    if given.pop("control", None) is not None:
        return collector.skip("ControlNet")
    given = {name: value for name, value in given.items() if value is not None}
    collector.offer(x, sigma, observer.interval, observer.branches, prompt, given)


class _Progress:
    """One bar over all prompts, with the sampler's own previews."""

    def __init__(self, patcher: ModelPatcher, runs: int, steps: int) -> None:
        self.total = runs * steps
        self.steps = steps
        self.bar = comfy.utils.ProgressBar(self.total)
        self.previewer = latent_preview.get_previewer(patcher.load_device, patcher.model.latent_format)

    def callback(self, place: int) -> Callable[..., None]:
        def report(step: int, x0: Any, x: Any, total_steps: int) -> None:
            picture = None
            if self.previewer is not None and isinstance(x0, Tensor) and not x0.is_nested:
                picture = self.previewer.decode_latent_to_preview_image("JPEG", x0)
            share = (step + 1) / max(total_steps, 1)
            self.bar.update_absolute(int((place + share) * self.steps), self.total, picture)

        return report


def encode_prompts(clip: Any, text: str) -> list[Any]:
    """One CONDITIONING per non-empty line. Raises TfmqError where there is no line, or no text encoder."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise TfmqError(
            "The prompts are empty: type at least one prompt, one per line (8 to 64 are a good number), or connect "
            "CONDITIONINGs."
        )
    if clip is None:
        raise TfmqError("There are prompts but no CLIP: connect the checkpoint's CLIP, or CONDITIONINGs instead.")
    conditionings = []
    for line in lines:
        comfy.model_management.throw_exception_if_processing_interrupted()
        conditionings.append(clip.encode_from_tokens_scheduled(clip.tokenize(line)))
    return conditionings


def ksampler_run(
    positives: Sequence[Any], negative: Any, latent: dict[str, Any], seed: int, steps: int, cfg: float,
    sampler_name: str, scheduler: str,
) -> Run:  # fmt: skip
    """The run of a plain KSampler; prompt number i is sampled with seed + i."""

    def run(model: ModelPatcher, number: int, callback: Callable[..., None]) -> None:
        start = _start(model, latent)
        noise = comfy.sample.prepare_noise(start, seed + number, latent.get("batch_index"))
        comfy.sample.sample(
            model, noise, steps, cfg, sampler_name, scheduler, positives[number], negative, start,
            noise_mask=latent.get("noise_mask"), callback=callback, disable_pbar=True, seed=seed + number,
        )  # fmt: skip

    return run


def guider_run(
    guider: Any, sampler: Any, sigmas: Tensor, noise: Any, latent: dict[str, Any], positives: Sequence[Any] | None
) -> Run:
    """The run of a custom sampler; each of `positives` takes the place of the guider's own positive conditioning."""

    def run(model: ModelPatcher, number: int, callback: Callable[..., None]) -> None:
        own = copy.copy(guider)
        own.model_patcher, own.model_options = model, model.model_options
        if positives is not None:
            own.original_conds = dict(guider.original_conds)
            own.inner_set_conds({"positive": positives[number]})
        start = _start(model, latent)
        made = noise.generate_noise({**latent, "samples": start})
        if number:
            made = comfy.sample.prepare_noise(start, noise.seed + number, latent.get("batch_index"))
        own.sample(
            made, start, sampler, sigmas, denoise_mask=latent.get("noise_mask"), callback=callback,
            disable_pbar=True, seed=noise.seed + number,
        )  # fmt: skip

    return run


def _start(model: ModelPatcher, latent: dict[str, Any]) -> Tensor:
    return comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    )


def describe(calibration: Calibration, path: str, found: bool) -> str:
    """A few lines about a calibration for the node."""
    visited = torch.stack([s.histogram.sum(1) > 0 for s in calibration.layers.values()]).any(0)
    lines = [
        f"{'Found' if found else 'Calibrated'}: {counted(len(calibration.layers), 'layer')}, {int(visited.sum())} of "
        f"{counted(calibration.partition.count, 'interval')} of the time axis visited",
        *(f"{name}: {value}" for name, value in calibration.settings.items()),
        f"file: {path}",
    ]
    return "\n".join(lines)
