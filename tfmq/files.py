"""Files: safetensors with a JSON manifest in the header, written beside their place and then renamed."""

from __future__ import annotations

import json
import os
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import TfmqError
from .observe.calibration import Calibration
from .observe.samples import Samples
from .observe.statistics import LayerStatistics
from .timeline import Partition, TimeAxis

MANIFEST = "tfmq"
VERSION = 3  # of a file whose writer names no other
PAIRS = 4  # of a model with temporal layers in 4 bits; before, these had another order of codes (`temporal.packing`)
NEWEST = PAIRS  # that is read
OPTIONAL = ("balance", "mean_square", "permutations", "weight_error", "rows")  # tensors that not every layer has
ROTATED = "rotated_"  # before the names of a layer's tensors that are about its rotated input
SAMPLES = "tfmq:samples:"  # before the names of a calibration's samples; no layer is called so
CALIBRATION, MODEL = "calibration", "model"


def write(path: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    """Write tensors and manifest; `path` holds the old file or the whole new one at any time.

    A manifest may have a `version` of its own, which older packs must know to read the file.

    Raises TfmqError where the disk is full or the folder cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.stem}.{uuid.uuid4().hex}.part"
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        header = {MANIFEST: json.dumps({"version": VERSION, **manifest})}
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=header)
        with suppress(OSError):  # not every file system has modes
            temporary.chmod(mode)  # as of any file; safetensors makes its own for their owner alone
        os.replace(temporary, path)
        temporary = None
    except (OSError, SafetensorError) as error:
        raise TfmqError(
            f"Could not write {path.name} in {path.parent}: {_cause(error)}; nothing was changed there, so free some "
            "space or choose another folder and queue again."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def read_manifest(path: Path, kind: str) -> dict[str, Any]:
    """The manifest of a file. Raises TfmqError for a truncated or foreign file, another kind, a newer version."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except FileNotFoundError as error:
        raise TfmqError(f"{path.name} is no longer in {path.parent}: run the node that wrote it again.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise TfmqError(
            f"{path.name} is not a complete safetensors file (it may have been cut off while copying): get or make it "
            "again."
        ) from error
    if MANIFEST not in header:
        raise TfmqError(f"{path.name} was not written by TFMQ: choose a file made by TFMQ Save.")
    try:
        manifest = json.loads(header[MANIFEST])
        version, found = int(manifest["version"]), str(manifest["kind"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise TfmqError(f"The TFMQ manifest in {path.name} cannot be read: get or make the file again.") from error
    if version > NEWEST:
        raise TfmqError(
            f"{path.name} was written by a newer TFMQ (format {version}, this one reads up to {NEWEST}): update the "
            "node pack."
        )
    if found != kind:
        raise TfmqError(f"{path.name} holds a {found}, but a {kind} is wanted here.")
    return manifest


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU. Raises TfmqError if it is incomplete."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise TfmqError(f"{path.name} cannot be read to its end: get or make it again.") from error


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Save a calibration, samples included; histograms go as float16 relative to their peak, for a small file."""
    tensors: dict[str, Tensor] = {}
    layers = {}
    for path_in_model, s in calibration.layers.items():
        layers[path_in_model] = {"kind": s.kind, "shape": list(s.shape), "order": s.order, "vector": s.vector}
        parts = _parts(s) | {key: getattr(s, key) for key in OPTIONAL}
        if s.rotated is not None:
            parts |= {f"{ROTATED}{name}": value for name, value in _parts(s.rotated).items()}
        tensors |= {f"{path_in_model}:{name}": value for name, value in parts.items() if value is not None}
    manifest = {
        "kind": CALIBRATION,
        "model": calibration.model,
        "sampling": calibration.sampling,
        "axis": [calibration.axis.low, calibration.axis.high],
        "edges": list(calibration.partition.edges),
        "settings": calibration.settings,
        "layers": layers,
    }
    if calibration.samples is not None:
        found, manifest["samples"] = calibration.samples.tensors()
        tensors |= {f"{SAMPLES}{name}": smallest_exact(value) for name, value in found.items()}
    write(path, tensors, manifest)


def read_calibration(path: Path) -> Calibration:
    """Load a calibration. Raises TfmqError as `read_manifest` and `read_tensors` do."""
    manifest = read_manifest(path, CALIBRATION)
    tensors = read_tensors(path)
    layers = {}
    try:
        for name, about in manifest["layers"].items():
            optional: dict[str, Any] = {key: tensors.get(f"{name}:{key}") for key in OPTIONAL}
            plain = LayerStatistics(
                kind=about["kind"], shape=tuple(about["shape"]), order=about["order"], vector=about["vector"],
                **optional,
                **_from_parts(tensors, f"{name}:"),
            )  # fmt: skip
            rotated = None
            if f"{name}:{ROTATED}histogram" in tensors:
                rotated = replace(plain, **_from_parts(tensors, f"{name}:{ROTATED}"))
            elif f"{name}:rotated_error" in tensors:  # version 1 knew no more about it
                nothing = torch.zeros_like(plain.histogram)
                rotated = replace(plain, histogram=nothing, branches=None, row_error=tensors[f"{name}:rotated_error"])
            layers[name] = replace(plain, rotated=rotated)
        axis, partition = TimeAxis(*manifest["axis"]), Partition(tuple(manifest["edges"]))
        samples = None
        if "samples" in manifest:
            own = {k.removeprefix(SAMPLES): v for k, v in tensors.items() if k.startswith(SAMPLES)}
            samples = Samples.from_tensors(own, manifest["samples"])
        return Calibration(
            manifest["model"], manifest["sampling"], axis, partition, layers, manifest["settings"], samples
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise TfmqError(f"The calibration {path.name} is damaged: delete it and calibrate again.") from error


def _parts(s: LayerStatistics) -> dict[str, Tensor | None]:
    """What is kept of one input's statistics."""
    peak = s.histogram.amax(1).float()
    unit = peak.clamp_min(1).unsqueeze(1)
    return {
        "low": s.low, "high": s.high, "histogram": (s.histogram.float() / unit).half(), "peak": peak,
        "branches": None if s.branches is None else (s.branches.float() / unit).half(),
        "bin_low": s.bin_low, "bin_high": s.bin_high, "row_error": s.row_error,
    }  # fmt: skip


def _from_parts(tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """The fields of `LayerStatistics` that `_parts` wrote, here with `prefix`."""
    found: dict[str, Any] = {
        key: tensors[f"{prefix}{key}"] for key in ("low", "high", "bin_low", "bin_high", "row_error")
    }
    peak = tensors[f"{prefix}peak"].unsqueeze(1)
    branches = tensors.get(f"{prefix}branches")
    found["histogram"] = tensors[f"{prefix}histogram"].float() * peak
    found["branches"] = None if branches is None else branches.float() * peak
    return found


def smallest_exact(tensor: Tensor) -> Tensor:
    """The tensor in half the bytes where that loses nothing (weights that came from a 16-bit file), else as it is."""
    if tensor.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            short = tensor.to(dtype)
            if torch.equal(short.to(torch.float32), tensor):
                return short
    return tensor


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).splitlines()[0] if str(error) else type(error).__name__
