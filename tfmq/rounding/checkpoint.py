"""Finished units on disk, one file each, so that a run that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from .. import files
from ..errors import TfmqError
from ..state import Rounded
from .units import Unit

KIND = "rounding"
Losses = tuple[float, float]


def write_unit(folder: Path, unit: Unit, layers: dict[str, Rounded], losses: Losses | None) -> None:
    """Raises TfmqError where it cannot be written."""
    tensors: dict[str, Tensor] = {}
    about = {}
    for path, rounded in layers.items():
        tensors |= {f"{path}:{name}": value for name, value in rounded.tensors().items()}
        about[path] = {"group": rounded.group, "note": rounded.note}
    files.write(_file(folder, unit), tensors, {"kind": KIND, "unit": unit.path, "layers": about, "losses": losses})


def read_unit(folder: Path, unit: Unit) -> tuple[dict[str, Rounded], Losses | None] | None:
    """What `write_unit` wrote, or None where that is not there, damaged, or of other layers."""
    path = _file(folder, unit)
    if not path.exists():
        return None
    try:
        about = files.read_manifest(path, KIND)
        tensors = files.read_tensors(path)
        if set(about["layers"]) != set(unit.layers):
            return None
        found = {}
        for layer, one in about["layers"].items():
            own = {key.removeprefix(f"{layer}:"): v for key, v in tensors.items() if key.startswith(f"{layer}:")}
            found[layer] = Rounded.from_tensors(int(one["group"]), str(one["note"]), own)
        losses = about["losses"]
        return found, None if losses is None else (float(losses[0]), float(losses[1]))
    except (TfmqError, KeyError, TypeError, ValueError):
        return None


def _file(folder: Path, unit: Unit) -> Path:
    return folder / f"{hashlib.sha256(unit.path.encode()).hexdigest()[:16]}.safetensors"
