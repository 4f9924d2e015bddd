"""A tiny MODEL in this process, calibrated, quantized and sampled without a server."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from devkit import inprocess
from support import tiny

inprocess.load_pack()

import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

PACK = inprocess.PACK_MODULE


def module(name: str) -> ModuleType:
    """A module of the pack as the host imports it, e.g. module("tfmq.host.leaf.leaf")."""
    return importlib.import_module(f"{PACK}.{name}")


nodes = module("nodes")
TfmqError = module("tfmq.errors").TfmqError


@contextmanager
def files_in(folder: Path) -> Iterator[None]:
    """Calibrations and saved models of this process go to `folder` and not into the host's own."""
    kinds = ("tfmq_calibrations", "diffusion_models")
    places = {kind: ([str(folder / kind)], folder_paths.supported_pt_extensions) for kind in kinds}
    for kind in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    with patch.dict(folder_paths.folder_names_and_paths, places):
        yield


def load(model: tiny.Tiny = tiny.SD15, **options: Any) -> Any:
    """The MODEL of a tiny checkpoint."""
    if model.kind == "diffusion_models":
        return comfy.sd.load_diffusion_model(str(model.path), model_options=options)
    return comfy.sd.load_checkpoint_guess_config(
        str(model.path), output_vae=False, output_clip=False, model_options=options
    )[0]


def conditioning(seed: int, model: tiny.Tiny = tiny.SD15, tokens: int = 7) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    about = {"pooled_output": torch.randn(1, model.pooled, generator=generator)} if model.pooled else {}
    return [[torch.randn(1, tokens, model.width, generator=generator), about]]


def latent(batch: int = 1, height: int = 8, width: int = 8) -> dict[str, Any]:
    return {"samples": torch.zeros(batch, 4, height, width), "downscale_ratio_spacial": 8}


def calibrate(patcher: Any, count: int = 2, **changed: Any) -> Any:
    """The handle of a calibration with random CONDITIONINGs; `changed` are inputs of TFMQ Calibrate."""
    positives = {f"positive{i}": conditioning(i) for i in range(count)}
    inputs = {
        "latent": latent(), "seed": 0, "steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal",
        "positives": positives, "intervals": 5,
    }  # fmt: skip
    with torch.inference_mode():
        return nodes.Calibrate.execute(patcher, **(inputs | changed)).args[0]


def quantize(patcher: Any, handle: Any, recipe: str = "W8A8", **options: Any) -> Any:
    with torch.inference_mode():
        return nodes.Quantize.execute(patcher, handle, recipe, **options).args[0]


def sample(
    patcher: Any, positive: Any = None, seed: int = 7, steps: int = 2, cfg: float = 1.0, **options: Any
) -> Tensor:
    """The latent that a KSampler makes."""
    positive = conditioning(1) if positive is None else positive
    start = options.pop("start", torch.zeros(1, 4, 8, 8))
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(start, seed)
        return comfy.sample.sample(
            patcher, noise, steps, cfg, "euler", "normal", positive, options.pop("negative", positive), start,
            disable_pbar=True, seed=seed, **options,
        )  # fmt: skip


def only(megabytes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the host believe that this much more memory is free for the next model."""
    original = ModelPatcher.partially_load

    def partially_load(self: Any, device: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> Any:
        return original(self, device, megabytes * 1e6, force_patch_weights)

    monkeypatch.setattr(ModelPatcher, "partially_load", partially_load)


def weights(patcher: Any) -> dict[str, Tensor]:
    """Copies of all parameters of the network that the MODEL has in common with its clones."""
    module("tfmq.host.model").release(patcher)
    return {key: value.detach().clone() for key, value in patcher.model.state_dict().items()}


def leaves(patcher: Any) -> dict[str, Any]:
    """Path in the network -> leaf, of a quantized MODEL."""
    found = patcher.attachments["tfmq"].plan.layers
    return {path: patcher.get_model_object(f"diffusion_model.{path}") for path in found}


def distance(value: Tensor, reference: Tensor) -> float:
    """Relative L2."""
    return float((value.float() - reference.float()).norm() / reference.float().norm())
