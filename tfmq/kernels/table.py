"""The table of backends: who can run which operation here, and the first that can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

from ..costs import FREE, Costs, GpuCosts
from . import float_conv, int_mm, onednn, reference, triton_backend, triton_probe
from .geometry import Geometry

LINEAR_STATIC, LINEAR_DYNAMIC, CONV2D_STATIC = "linear_static", "linear_dynamic", "conv2d_static"
# Of GroupNorm and SiLU before it; only where a backend is faster with all three in one.
CONV2D_STATIC_NORMED = "conv2d_static_normed"
# GEGLU inside of the product; only where a backend has it.
MULTIPLY_GATED = "multiply_gated"


@dataclass(frozen=True)
class Backend:
    """`module`: holds `prepare(codes, scale, geometry, sums)` and the operations by name.

    `refuse(operation, device, geometry)`: why it cannot run this, or None.
    """

    name: str
    module: ModuleType
    refuse: Callable[[str, torch.device, Geometry], str | None]
    costs: Costs


def _onednn(operation: str, device: torch.device, geometry: Geometry) -> str | None:
    if device.type != "cpu":
        return "only on CPUs"
    return onednn.unsafe(geometry) or onednn.missing()


def _triton(operation: str, device: torch.device, geometry: Geometry) -> str | None:
    return triton_backend.missing(device) or triton_probe.fault(device) or triton_backend.unsafe(geometry)


def _int_mm(operation: str, device: torch.device, geometry: Geometry) -> str | None:
    if geometry.groups != 1:
        return "no grouped convolution"
    if device.type == "cpu":
        return None if hasattr(torch, "_int_mm") else "this torch has no integer matrix product"
    if device.type != "cuda":
        return f"no integer matrix product on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 5):
        return "the GPU has no int8 tensor cores"
    if geometry.is_conv and (geometry.shape[2:] != (1, 1) or any(geometry.padding)):
        return "only 1 x 1 convolutions on a GPU: others would have to gather their patches"
    return None


def _float_conv(operation: str, device: torch.device, geometry: Geometry) -> str | None:
    if operation != CONV2D_STATIC:
        return "only convolutions"
    return None if device.type == "cuda" else "only on GPUs"


def _reference(operation: str, device: torch.device, geometry: Geometry) -> str | None:
    return None


# Measured dynamic costs: bench/dynamic_cost.py.
BACKENDS = (
    # On shapes of SD1.5 in bfloat16 a per-token layer took 1.2 to 1.7 times as long (2, since beside the error of
    # integer convolutions that of a Linear does not show: docs/quantization.md), one of 320 input channels 2.1 to 2.5,
    # a rotation 0.22 to 0.33 of the time.
    Backend("onednn", onednn, _onednn, Costs(2.0, 0.3, 2.4)),
    # Not measured: a row is read once more, out of the cache.
    Backend("triton", triton_backend, _triton, GpuCosts(1.1)),
    Backend("int_mm", int_mm, _int_mm, Costs(1.2)),
    Backend("float_conv", float_conv, _float_conv, FREE),
    Backend("reference", reference, _reference, FREE),
)


def pick(operation: str, device: torch.device, geometry: Geometry) -> Backend:
    """The first backend that runs `operation` for this layer on this device."""
    if triton_probe.undecided(device):
        return _first(operation, device, geometry)
    return _kept(operation, device, geometry)


def _first(operation: str, device: torch.device, geometry: Geometry) -> Backend:
    return next(b for b in BACKENDS if b.refuse(operation, device, geometry) is None)


_kept = lru_cache(maxsize=4096)(_first)
pick.cache_clear = _kept.cache_clear  # type: ignore[attr-defined]


def refusals(operation: str, device: torch.device, geometry: Geometry) -> dict[str, str]:
    """Backend name -> why it was passed over, for those before the one that was picked."""
    out = {}
    for backend in BACKENDS:
        reason = backend.refuse(operation, device, geometry)
        if reason is None:
            break
        out[backend.name] = reason
    return out
