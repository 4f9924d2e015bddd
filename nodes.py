"""The nodes: schema and tooltips here, the work in `tfmq`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.samplers
import comfy.utils
import folder_paths
from comfy_api.latest import ComfyExtension, io, ui

from .nodes_report import TemporalReport
from .tfmq.errors import TfmqError
from .tfmq.formats.int4 import GROUPS
from .tfmq.host import calibrate as calibration
from .tfmq.host import quantize, quantized, store, summary
from .tfmq.host.temporal import cache as temporal_cache
from .tfmq.host.temporal import quantize as temporal_quant
from .tfmq.host.temporal import table as temporal_table
from .tfmq.observe import sampling_times as steps_of_run
from .tfmq.report import metrics, sheet
from .tfmq.scheme import AT_A_QUALITY, PRESETS, ROUNDINGS, UNDER_A_SIZE
from .tfmq.words import counted

CATEGORY = "TFMQ"
CalibrationType = io.Custom("TFMQ_CALIBRATION")


def _look() -> Any:
    return io.Combo.Input(
        "look", options=list(steps_of_run.RULES), default=steps_of_run.TRAJECTORY, advanced=True, optional=True,
        tooltip=(
            "Which steps of each run are looked at: all of them (trajectory), half of them evenly over the log "
            "signal-to-noise ratio, or half of them drawn from PTQ4DM's normal distribution."
        ),
    )  # fmt: skip


class Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_Calibrate",
            display_name="TFMQ Calibrate",
            category=CATEGORY,
            description=(
                "Runs your own sampler on your own prompts and learns, for every layer and every part of the denoising "
                "schedule, which values pass through it. The result is kept on disk: the same request is instant the "
                "next time."
            ),
            search_aliases=["quantize", "quantization", "int8", "ptq", "calibration", "w8a8"],
            inputs=[
                io.Model.Input("model", tooltip="The 16- or 32-bit model, with any LoRA that shall be baked in."),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts. Not needed with CONDITIONINGs."),
                io.String.Input(
                    "prompts", multiline=True, default="", optional=True,
                    tooltip="One prompt per line, like those you make pictures of; 8 to 64 are a good number.",
                ),
                io.Autogrow.Input(
                    "positives", optional=True,
                    template=io.Autogrow.TemplatePrefix(
                        io.Conditioning.Input("positive", optional=True), prefix="positive", min=0, max=64
                    ),
                    tooltip="Ready CONDITIONINGs, beside or instead of the prompts.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True,
                    tooltip="Negative conditioning. Without one: the empty prompt, or nothing at cfg 1.",
                ),
                io.Latent.Input("latent", tooltip="The size of the pictures; an empty latent will do."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Noise of the first prompt; each further one counts up.",
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
                    tooltip="Into how many parts the time axis is cut; each has its own activation ranges.",
                ),
                _look(),
            ],
            outputs=[CalibrationType.Output(display_name="calibration"), io.String.Output(display_name="summary")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, latent: Any, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str,
        clip: Any = None, prompts: str = "", positives: Any = None, negative: Any = None, intervals: int = 25,
        look: str = steps_of_run.TRAJECTORY,
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
                io.Noise.Input("noise", tooltip="As in SamplerCustomAdvanced; each further prompt counts its seed up."),
                io.Guider.Input("guider", tooltip="Brings the model and its conditioning."),
                io.Sampler.Input("sampler", tooltip="As you sample."),
                io.Sigmas.Input("sigmas", tooltip="As you sample."),
                io.Latent.Input("latent", tooltip="The size of the pictures; an empty latent will do."),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts."),
                io.String.Input(
                    "prompts", multiline=True, default="", optional=True,
                    tooltip="One prompt per line; each replaces the guider's positive. Empty: the guider's own.",
                ),
                io.Int.Input(
                    "intervals", default=25, min=1, max=200, advanced=True,
                    tooltip="Into how many parts the time axis is cut; each has its own activation ranges.",
                ),
                _look(),
            ],
            outputs=[CalibrationType.Output(display_name="calibration"), io.String.Output(display_name="summary")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, noise: Any, guider: Any, sampler: Any, sigmas: Any, latent: Any, clip: Any = None, prompts: str = "",
        intervals: int = 25, look: str = steps_of_run.TRAJECTORY,
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


class Quantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_Quantize",
            display_name="TFMQ Quantize",
            category=CATEGORY,
            description=(
                "Swaps the layers of the model for ones that compute in integers, with weights of 8 or 4 bits, "
                "convolutions included. LoRAs on the model are baked in; LoRAs behind this node work as usual and are "
                "never rounded."
            ),
            search_aliases=["int8", "int4", "w8a8", "w4a8", "quantization", "compress", "faster", "low vram"],
            inputs=[
                io.Model.Input("model", tooltip="The same MODEL that went into TFMQ Calibrate."),
                CalibrationType.Input("calibration", tooltip="From TFMQ Calibrate."),
                io.Combo.Input(
                    "recipe", options=list(PRESETS), default="W8A8",
                    tooltip=(
                        "How small. W8A8: 8-bit weights and activations. Linear only: convolutions stay in float. "
                        "W4A8: 4-bit weights, half the size. W4A16: 4-bit weights, computes in float (NF4, FP4: Linear "
                        "layers by bitsandbytes). Best under a size, smallest at a quality: 4, 8 or 16 bits per layer."
                    ),
                ),
                io.Combo.Input(
                    "activations", options=["auto", "static", "dynamic"], default="auto", advanced=True,
                    tooltip="Linear layers: ranges per interval from the calibration, or per token at run time.",
                ),
                io.Combo.Input(
                    "ranges", options=["mse", "percentile", "minmax", "one range", "tdq"], default="mse", advanced=True,
                    tooltip=(
                        "How a static range is chosen: per interval by least error, percentile or extremes; one range "
                        "for all of time; or a learned smooth function of time (TDQ)."
                    ),
                ),
                io.Combo.Input(
                    "temporal", options=list(temporal_quant.MODES), default=temporal_quant.FLOAT, advanced=True,
                    optional=True,
                    tooltip=(
                        "Layers that only know the timestep (SD1.5-like models): left in float, in integers with "
                        "rounding fitted to all timesteps, or the best mix with caches within the bytes of int8."
                    ),
                ),
                io.Combo.Input(
                    "effort", options=list(ROUNDINGS), default=ROUNDINGS[0], optional=True,
                    tooltip=(
                        "How long, for 4-bit weights. nearest: seconds. fast: rounding that makes up for its own "
                        "errors. balanced: and for those of the layers before, scales tuned block by block; minutes "
                        "for a small model, longer for yours. best: rounding learnt block by block as well, days on a "
                        "CPU. best+: balanced (not best), then scales and time embedding fine-tuned against the float "
                        "model's predictions."
                    ),
                ),
                io.Combo.Input(
                    "group", options=[str(g) for g in GROUPS], default=str(GROUPS[0]), advanced=True, optional=True,
                    tooltip="Weights that share a range in 4 bits: fewer are more precise and a little larger.",
                ),
                io.Float.Input(
                    "size_mb", default=0.0, min=0.0, max=1e6, step=1.0, round=0.01, advanced=True, optional=True,
                    tooltip="For 'best under a size': MB of the diffusion model in the saved file.",
                ),
                io.Float.Input(
                    "quality_db", default=35.0, min=0.0, max=120.0, step=1.0, round=0.01, advanced=True, optional=True,
                    tooltip=(
                        "For 'smallest at a quality': how far the error of the model's prediction must stay below the "
                        "prediction, in dB; 10 more is a third of the error. Not the PSNR of pictures."
                    ),
                ),
                io.String.Input(
                    "plan", default="", multiline=True, advanced=True, optional=True,
                    tooltip=(
                        "The report of an earlier run with some bits changed, or a line like "
                        '{"layers": {"input_blocks.1.0.in_layers.2": 8}}; layers without a line are decided.'
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.String.Output(display_name="summary"),
                io.String.Output(display_name="report", tooltip="The same as JSON."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, calibration: Any, recipe: str, activations: str = "auto", ranges: str = "mse",
        temporal: str = temporal_quant.FLOAT, effort: str = ROUNDINGS[0], group: str = str(GROUPS[0]),
        size_mb: float = 0.0, quality_db: float = 35.0, plan: str = "",
    ) -> io.NodeOutput:  # fmt: skip
        wanted = replace(
            PRESETS[recipe], activations=activations, ranges=ranges, temporal=temporal, rounding=effort,
            group=int(group),
        )  # fmt: skip
        if recipe == UNDER_A_SIZE:
            if size_mb <= 0:
                raise TfmqError(
                    f"The recipe '{recipe}' needs a size: set size_mb, an advanced input of TFMQ Quantize, to the MB "
                    "that the file may have."
                )
            wanted = replace(wanted, budget=int(size_mb * 1e6))
        elif recipe == AT_A_QUALITY:
            wanted = replace(wanted, quality=quality_db)
        bar = comfy.utils.ProgressBar(1)
        result = quantize.quantize(model, calibration.load(), wanted, bar.update_absolute, plan)
        record = quantized.require_quantized(result)
        text = summary.text(record)
        return io.NodeOutput(result, text, summary.report(record), ui=ui.PreviewText(text))


class Save(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_Save",
            display_name="TFMQ Save",
            category=CATEGORY,
            description=(
                "Writes a quantized model as one .safetensors into the first of ComfyUI's diffusion model folders "
                "(models/unet by default). LoRAs behind TFMQ Quantize are not part of it."
            ),
            search_aliases=["save quantized", "export int8"],
            inputs=[
                io.Model.Input("model", tooltip="From TFMQ Quantize."),
                io.String.Input("filename_prefix", default="tfmq/model", tooltip="Folder and name of the file."),
                io.Combo.Input(
                    "temporal", options=[temporal_table.WEIGHTS, temporal_table.TABLE], default=temporal_table.WEIGHTS,
                    advanced=True, optional=True,
                    tooltip=(
                        "Layers that only know the timestep: by their weights, or as a table over all timesteps in "
                        "place of them (Qwen-Image, AuraFlow, Wan 2.1, Lumina 2, Z-Image, PixArt-Sigma, SD1.5)."
                    ),
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, filename_prefix: str, temporal: str = temporal_table.WEIGHTS) -> io.NodeOutput:
        bar = comfy.utils.ProgressBar(1)
        path = store.save(model, filename_prefix, temporal, bar.update_absolute)
        return io.NodeOutput(str(path), ui=ui.PreviewText(store.receipt(path)))


class Load(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_Load",
            display_name="TFMQ Load",
            category=CATEGORY,
            description="Loads a model that TFMQ Save wrote, without calibrating; the pictures are the same.",
            search_aliases=["load quantized", "int8", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=store.saved_models(),
                    tooltip="A file of TFMQ Save, in any of ComfyUI's diffusion model folders.",
                )
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="summary")],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path(store.FOLDER, model_name)
        if path is None:
            raise TfmqError(f"{model_name} is no longer in ComfyUI's {store.FOLDER} folders: choose another file.")
        model = store.load(path)
        text = summary.text(quantized.require_quantized(model))
        warning = store.sampling_warning(model)
        text = f"{text}\nnote: {warning}" if warning else text
        return io.NodeOutput(model, text, ui=ui.PreviewText(text))

    @classmethod
    def fingerprint_inputs(cls, model_name: str) -> str:
        path = folder_paths.get_full_path(store.FOLDER, model_name)
        return f"{model_name} {store.stamp(path)}"

    @classmethod
    def validate_inputs(cls, model_name: str) -> bool | str:
        if folder_paths.get_full_path(store.FOLDER, model_name) is None:
            return f"{model_name} is not in ComfyUI's {store.FOLDER} folders: choose a file made by TFMQ Save."
        return True


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_Compare",
            display_name="TFMQ Compare",
            category=CATEGORY,
            description=(
                "Two batches of pictures made with the same seeds, side by side with their amplified difference, with "
                "PSNR and SSIM (and LPIPS where the lpips package and its weights are installed)."
            ),
            search_aliases=["psnr", "ssim", "lpips", "difference", "side by side"],
            inputs=[
                io.Image.Input("reference", tooltip="From the float model."),
                io.Image.Input("candidate", tooltip="From the quantized model, same seeds."),
                io.Float.Input(
                    "amplify", default=8.0, min=1.0, max=255.0, step=1.0, advanced=True,
                    tooltip="Factor on the difference picture.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet"),
                io.String.Output(display_name="summary"),
                io.Float.Output(display_name="psnr_db"),
                io.Float.Output(display_name="ssim"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, reference: Any, candidate: Any, amplify: float = 8.0) -> io.NodeOutput:
        try:
            found = metrics.compare(reference, candidate)
        except ValueError as error:
            raise TfmqError(str(error)) from None
        pictures = sheet.side_by_side(reference, candidate, amplify=amplify)
        lpips = found["lpips"]
        text = f"{counted(found['images'], 'picture')}: PSNR {found['psnr_db']:.2f} dB, SSIM {found['ssim']:.4f}"
        text += f", LPIPS {lpips:.4f}" if lpips is not None else f" (no LPIPS: {metrics.lpips_unavailable_reason()})"
        return io.NodeOutput(
            pictures, text, float(found["psnr_db"]), float(found["ssim"]),
            ui={**ui.PreviewImage(pictures, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()},
        )  # fmt: skip


class TemporalCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQ_TemporalCache",
            display_name="TFMQ Temporal Cache",
            category=CATEGORY,
            description=(
                "Answers the layers that only know when the network is passed (28 to 34 % of Flux.1, SD3 and "
                "Qwen-Image) from a small table instead of loading their weights. The pictures stay the same."
            ),
            search_aliases=["modulation", "adaln", "low vram", "timestep embedding", "cache"],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL: float or quantized, with or without LoRAs."),
                io.Int.Input(
                    "budget_mb", default=512, min=1, max=1_000_000, advanced=True,
                    tooltip="How large the table may grow, in MB; what was not used for longest goes first.",
                ),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="summary")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, budget_mb: int = 512) -> io.NodeOutput:
        result = temporal_cache.apply(model, budget_mb * 1_000_000)
        text = temporal_cache.describe(result)
        return io.NodeOutput(result, text, ui=ui.PreviewText(text))


class TfmqExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [Calibrate, CalibrateCustom, Quantize, Save, Load, Compare, TemporalCache, TemporalReport]


async def comfy_entrypoint() -> TfmqExtension:
    return TfmqExtension()
