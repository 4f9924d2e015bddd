"""Files: safetensors with a JSON manifest in the header, written beside their place and then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .calibration import Calibration
from .errors import TfmqError
from .observe import LayerStatistics
from .timeline import Partition, TimeAxis

MANIFEST = "tfmq"
VERSION = 1
CALIBRATION, MODEL = "calibration", "model"


def write(path: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    """Write tensors and manifest; `path` holds the old file or the whole new one at any time.

    Raises TfmqError where the disk is full or the folder cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        header = {MANIFEST: json.dumps({"version": VERSION, **manifest})}
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=header)
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
    if version > VERSION:
        raise TfmqError(
            f"{path.name} was written by a newer TFMQ (format {version}, this one reads up to {VERSION}): update the "
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
    """Save a calibration; histograms go as float16 relative to their peak, for a small file."""
    tensors: dict[str, Tensor] = {}
    layers = {}
    for path_in_model, s in calibration.layers.items():
        layers[path_in_model] = {"kind": s.kind, "shape": list(s.shape), "order": s.order, "vector": s.vector}
        peak = s.histogram.amax(1).float()
        relative = s.histogram.float() / peak.clamp_min(1).unsqueeze(1)
        parts = {
            "low": s.low, "high": s.high, "balance": s.balance, "histogram": relative.half(), "peak": peak,
            "bin_low": s.bin_low, "bin_high": s.bin_high, "row_error": s.row_error,
        }  # fmt: skip
        if s.rotated_error is not None:
            parts["rotated_error"] = s.rotated_error
        if s.branches is not None:
            parts["branches"] = (s.branches.float() / peak.clamp_min(1).unsqueeze(1)).half()
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
    write(path, tensors, manifest)


def read_calibration(path: Path) -> Calibration:
    """Load a calibration. Raises TfmqError as `read_manifest` and `read_tensors` do."""
    manifest = read_manifest(path, CALIBRATION)
    tensors = read_tensors(path)
    layers = {}
    try:
        for name, about in manifest["layers"].items():
            part = {key: tensors[f"{name}:{key}"] for key in ("low", "high", "bin_low", "bin_high", "row_error")}
            histogram = tensors[f"{name}:histogram"].float() * tensors[f"{name}:peak"].unsqueeze(1)
            branches = tensors.get(f"{name}:branches")
            if branches is not None:
                branches = branches.float() * tensors[f"{name}:peak"].unsqueeze(1)
            layers[name] = LayerStatistics(
                kind=about["kind"], shape=tuple(about["shape"]), order=about["order"], histogram=histogram,
                balance=tensors.get(f"{name}:balance"), vector=about["vector"], branches=branches,
                rotated_error=tensors.get(f"{name}:rotated_error"), **part,
            )  # fmt: skip
        axis, partition = TimeAxis(*manifest["axis"]), Partition(tuple(manifest["edges"]))
        return Calibration(manifest["model"], manifest["sampling"], axis, partition, layers, manifest["settings"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise TfmqError(f"The calibration {path.name} is damaged: delete it and calibrate again.") from error


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
