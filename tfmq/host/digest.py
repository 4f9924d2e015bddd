"""Hashes by content: of weights, conditionings, and whatever nodes hang on a MODEL."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

SAMPLES = 64  # entries of each weight that are looked at
DEPTH = 8  # of objects within objects
# What a run leaves behind in ControlNets; in hooks it is what begins with `_curr`.
VOLATILE = ("cond_hint", "timestep_range")


def update_digest(digest: Any, value: Any, samples: int | None = None, depth: int = DEPTH) -> None:
    """Hash tensors by content (all of it, or `samples` entries spread over it), containers, functions and objects by
    what they hold."""
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        if samples is not None and flat.numel() > samples:
            flat = flat[:: flat.numel() // samples]
        digest.update(f"{tuple(value.shape)}".encode())
        digest.update(flat.cpu().double().numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            update_digest(digest, value[key], samples, depth)
    elif isinstance(value, (list, tuple)):
        for item in value:
            update_digest(digest, item, samples, depth)
    elif isinstance(value, (str, int, float, bool, type(None))):
        digest.update(repr(value).encode())
    else:
        digest.update(_name(value).encode())
        if depth:
            update_digest(digest, _parts(value), SAMPLES if isinstance(value, nn.Module) else samples, depth - 1)


def _name(value: Any) -> str:
    own = value if isinstance(value, type) or not hasattr(value, "__dict__") else type(value)
    return str(getattr(value, "__qualname__", None) or getattr(own, "__qualname__", None) or type(value).__qualname__)


def _parts(value: Any) -> Any:
    """What an object that is no container holds."""
    if isinstance(value, (type, ModelPatcher)):
        return None
    if isinstance(value, nn.Module):
        return dict(value.state_dict())
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if hasattr(value, "__self__"):
        return value.__self__, _parts(value.__func__) if hasattr(value, "__func__") else None
    if isinstance(value, Callable) and hasattr(value, "__closure__"):  # type: ignore[arg-type]
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return cells, getattr(value, "__defaults__", None)
    if hasattr(value, "weights") and not hasattr(value, "hook_ref"):  # a weight adapter
        return value.weights
    held = getattr(value, "__dict__", {})
    return {name: part for name, part in held.items() if name not in VOLATILE and not name.startswith("_curr")}


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
