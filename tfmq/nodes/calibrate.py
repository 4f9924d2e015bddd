"""TFMQ Calibrate, and the same for graphs with a GUIDER."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io, ui

from ..errors import TfmqError
from ..host import calibrate as calibration
from ..host.step_choice import RULES
from ..observe.sampling_times import TRAJECTORY
from . import CATEGORY, CalibrationType, combo

LOOK = "Which steps of each run are looked at."


class Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_Calibrate",
            display_name="TFMQ Calibrate",
            category=CATEGORY,
            description=(
                "Runs your own sampler on your own prompts and learns which values pass through each layer in each "
                "part of the denoising schedule. The result is kept on disk, so that the same request is instant "
                "later."
            ),
            search_aliases=["quantize", "quantization", "int8", "ptq", "calibration", "w8a8"],
            inputs=[
                io.Model.Input("model", tooltip="The 16- or 32-bit model, with the LoRAs to bake in."),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts. Not needed with CONDITIONINGs."),
                io.String.Input(
                    "prompts", multiline=True, default="", optional=True,
                    tooltip="One prompt per line, like those you make pictures of. Use 8 to 64 of them.",
                ),
                io.Autogrow.Input(
                    "positives", optional=True,
                    template=io.Autogrow.TemplatePrefix(
                        io.Conditioning.Input("positive", optional=True), prefix="positive", min=0, max=64
                    ),
                    tooltip="CONDITIONINGs, beside the prompts or instead of them.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True,
                    tooltip="Negative conditioning. Without one, the CLIP encodes the empty prompt.",
                ),
                io.Latent.Input("latent", tooltip="The size of the pictures. An empty latent is enough."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="The noise of the first prompt. Each further prompt adds 1.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Steps per prompt, as you sample."),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="As you sample. At 1 the unconditional branch does not run and is not calibrated.",
                ),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="As you sample."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As you sample."),
                io.Int.Input(
                    "intervals", default=25, min=1, max=200, advanced=True,
                    tooltip="The number of intervals on the time axis. Each has its own activation ranges.",
                ),
                combo("look", RULES, LOOK, advanced=True, optional=True),
            ],
            outputs=[CalibrationType.Output(display_name="calibration"), io.String.Output(display_name="summary")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, latent: Any, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str,
        clip: Any = None, prompts: str = "", positives: Any = None, negative: Any = None, intervals: int = 25,
        look: str = TRAJECTORY,
    ) -> io.NodeOutput:  # fmt: skip
        given = [p for p in (positives or {}).values() if p is not None]
        if prompts.strip() or not given:
            given += calibration.encode_prompts(clip, prompts)
        if negative is None and clip is not None:
            negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        if negative is None:
            if cfg != 1.0:
                raise TfmqError(
                    f"cfg is {cfg:g} but there is no negative conditioning: connect one, or a CLIP, or set cfg to 1."
                )
            negative = given[0]  # the host drops it at cfg 1
        run = calibration.ksampler_run(given, negative, latent, seed, steps, cfg, sampler_name, scheduler)
        settings = calibration.Settings(
            (given, negative, latent, seed, steps, cfg, sampler_name, scheduler),
            {"prompts": len(given), "sampler": f"{sampler_name}, {scheduler}, {steps} steps, cfg {cfg:g}, seed {seed}"},
        )
        return _calibrated(model, run, len(given), steps, intervals, settings, look)


class CalibrateCustom(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_CalibrateCustom",
            display_name="TFMQ Calibrate (Custom Sampler)",
            category=CATEGORY,
            description=(
                "TFMQ Calibrate for graphs with NOISE, GUIDER, SAMPLER and SIGMAS (Flux, Wan, ...). The MODEL is the "
                "guider's."
            ),
            search_aliases=["quantize", "quantization", "int8", "calibration", "flux", "guider"],
            inputs=[
                io.Noise.Input("noise", tooltip="As in SamplerCustomAdvanced. Each further prompt adds 1 to its seed."),
                io.Guider.Input("guider", tooltip="Has the model and its conditioning."),
                io.Sampler.Input("sampler", tooltip="As you sample."),
                io.Sigmas.Input("sigmas", tooltip="As you sample."),
                io.Latent.Input("latent", tooltip="The size of the pictures. An empty latent is enough."),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts."),
                io.String.Input(
                    "prompts", multiline=True, default="", optional=True,
                    tooltip="One prompt per line. Each replaces the guider's positive. Without one: the guider's own.",
                ),
                io.Int.Input(
                    "intervals", default=25, min=1, max=200, advanced=True,
                    tooltip="The number of intervals on the time axis. Each has its own activation ranges.",
                ),
                combo("look", RULES, LOOK, advanced=True, optional=True),
            ],
            outputs=[CalibrationType.Output(display_name="calibration"), io.String.Output(display_name="summary")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, noise: Any, guider: Any, sampler: Any, sigmas: Any, latent: Any, clip: Any = None, prompts: str = "",
        intervals: int = 25, look: str = TRAJECTORY,
    ) -> io.NodeOutput:  # fmt: skip
        positives = calibration.encode_prompts(clip, prompts) if prompts.strip() else None
        steps = len(sigmas) - 1
        if steps < 1:
            raise TfmqError("The sigmas hold no step: connect the SIGMAS of a scheduler with at least one step.")
        run = calibration.guider_run(guider, sampler, sigmas, noise, latent, positives)
        function = getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)
        conditioning = guider.original_conds if positives is None else positives
        scalars = {k: v for k, v in vars(guider).items() if isinstance(v, (int, float, bool, str))}
        settings = calibration.Settings(
            (conditioning, scalars, function, getattr(sampler, "extra_options", {}), sigmas, latent, noise.seed),
            {"prompts": len(positives or [0]), "sampler": f"{function}, {steps} steps, seed {noise.seed}"},
        )
        return _calibrated(guider.model_patcher, run, len(positives or [0]), steps, intervals, settings, look)


def _calibrated(
    model: Any, run: Any, prompts: int, steps: int, intervals: int, settings: calibration.Settings, look: str
) -> io.NodeOutput:
    handle, found = calibration.calibrate(model, run, prompts, steps, intervals, settings, look)
    text = calibration.describe(handle.load(), handle.path, found)
    return io.NodeOutput(handle, text, ui=ui.PreviewText(text))
