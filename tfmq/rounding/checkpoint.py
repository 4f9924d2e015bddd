"""Finished units on disk, one file each, so that a run that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from .. import files
from ..errors import TfmqError
from ..formats.int4 import Grid
from ..state import Rounded
from .units import Unit

KIND = "rounding"
Losses = tuple[float, float]


def write_unit(folder: Path, unit: Unit, layers: dict[str, Rounded], losses: Losses | None) -> None:
    """Raises TfmqError where it cannot be written."""
    tensors: dict[str, Tensor] = {}
    about = {}
    for path, rounded in layers.items():
        grid = rounded.grid
        parts = {
            "codes": rounded.codes, "scale": grid.scale, "factor": grid.factor, "zero": grid.zero,
            "act_scale": rounded.act_scale, "act_zero_point": rounded.act_zero_point,
        }  # fmt: skip
        tensors |= {f"{path}:{name}": value for name, value in parts.items() if value is not None}
        about[path] = {"group": grid.group, "note": rounded.note}
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
            scale, factor, zero, codes = (tensors[f"{layer}:{part}"] for part in ("scale", "factor", "zero", "codes"))
            found[layer] = Rounded(
                codes, Grid(scale, factor, zero, int(one["group"])), tensors.get(f"{layer}:act_scale"),
                tensors.get(f"{layer}:act_zero_point"), str(one["note"]),
            )  # fmt: skip
        losses = about["losses"]
        return found, None if losses is None else (float(losses[0]), float(losses[1]))
    except (TfmqError, KeyError, TypeError, ValueError):
        return None


def _file(folder: Path, unit: Unit) -> Path:
    return folder / f"{hashlib.sha256(unit.path.encode()).hexdigest()[:16]}.safetensors"
