"""The table of backends: who can run which operation here, and the first that can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

from ..geometry import Geometry
from . import float_conv, float_product, int_mm, kitchen, onednn, reference, trial
from .costs import FREE, Costs, GpuCosts
from .rates import no_int8, slower
from .triton import backend as triton_backend
from .triton import int_mm as triton_int_mm

LINEAR_STATIC, LINEAR_DYNAMIC, CONV2D_STATIC = "linear_static", "linear_dynamic", "conv2d_static"
# Of GroupNorm and SiLU before it; only where a backend is faster with all three in one.
CONV2D_STATIC_NORMED = "conv2d_static_normed"
# GEGLU inside of the product; only where a backend has it.
MULTIPLY_GATED = "multiply_gated"


@dataclass(frozen=True)
class Backend:
    """`module`: holds `prepare(codes, scale, geometry, sums)` and the operations by name.

    `refuse(operation, device, geometry)`: why it cannot run this or should not, or None. `note`: what a person who got
    it should know.
    """

    name: str
    module: ModuleType
    refuse: Callable[[str, torch.device, Geometry], str | None]
    costs: Costs
    note: str = ""


def _onednn(operation: str, device: torch.device, geometry: Geometry) -> str | None:
    if device.type != "cpu":
        return "only on CPUs"
    return onednn.unsafe(geometry) or onednn.missing()


def _triton(operation: str, device: torch.device, geometry: Geometry) -> str | None:
    reason = triton_backend.missing(device) or triton_backend.unsafe(geometry)
    # Of one operation: whatever is tried has to be compiled.
    return reason or trial.fault("triton", triton_backend, device, (LINEAR_STATIC,))


def _triton_int_mm(operation: str, device: torch.device, geometry: Geometry) -> str | None:
    reason = triton_backend.unsafe(geometry) or triton_int_mm.missing(device)
    reason = reason or slower(device, geometry, triton_int_mm.PASSES)
    return reason or trial.fault("triton_int_mm", triton_int_mm, device)


def _kitchen(operation: str, device: torch.device, geometry: Geometry) -> str | None:
    if geometry.is_conv:
        return "only Linear layers"
    reason = kitchen.missing(device) or kitchen.unsafe(geometry)
    reason = reason or slower(device, geometry, kitchen.PASSES[operation])
    return reason or trial.fault("kitchen", kitchen, device, tolerance=kitchen.TOLERANCE)


def _int_mm(operation: str, device: torch.device, geometry: Geometry) -> str | None:
    if geometry.groups != 1:
        return "no grouped convolution"
    if device.type == "cpu":
        return None if hasattr(torch, "_int_mm") else "this torch has no integer matrix product"
    reason = no_int8(device)
    if reason is None and geometry.is_conv and (geometry.shape[2:] != (1, 1) or any(geometry.padding)):
        reason = "only 1 x 1 convolutions on a GPU: others would have to gather their patches byte by byte"
    return reason or slower(device, geometry, int_mm.PASSES) or trial.fault("int_mm", int_mm, device)


def _float_conv(operation: str, device: torch.device, geometry: Geometry) -> str | None:
    if operation != CONV2D_STATIC:
        return "only convolutions"
    return "only on GPUs" if device.type == "cpu" else None


def _float_product(operation: str, device: torch.device, geometry: Geometry) -> str | None:
    if geometry.is_conv:
        return "only Linear layers"
    return "only on GPUs" if device.type == "cpu" else None


def _reference(operation: str, device: torch.device, geometry: Geometry) -> str | None:
    return None


# Measured dynamic costs: bench/speed/dynamic_cost.py.
BACKENDS = (
    # On shapes of SD1.5 in bfloat16 a per-token layer took 1.2 to 1.7 times as long (2, since beside the error of
    # integer convolutions that of a Linear does not show: docs/decisions/static-or-per-token.md), one of 320 input
    # channels 2.1 to 2.5, a rotation 0.22 to 0.33 of the time.
    Backend("onednn", onednn, _onednn, Costs(2.0, 0.3, 2.4)),
    # Not measured: a row is read once more, out of the cache.
    Backend("triton", triton_backend, _triton, GpuCosts(1.1)),
    Backend(
        "triton_int_mm", triton_int_mm, _triton_int_mm, GpuCosts(1.1),
        "PyTorch's int8 product between Triton kernels of ours: Triton makes none for this GPU",
    ),
    # By `kitchen.PASSES`; a per-token layer is given to it only where it is faster than in float16.
    Backend(
        "kitchen", kitchen, _kitchen, FREE,
        "int8 kernels that come with ComfyUI; each row gets a range of its own about the calibrated one's centre",
    ),
    Backend("int_mm", int_mm, _int_mm, Costs(1.2)),
    Backend(
        "float_conv", float_conv, _float_conv, FREE,
        "computes in the model's float type: no fast integer convolution for these here",
    ),
    Backend(
        "float_product", float_product, _float_product, FREE,
        "computes in the model's float type: no integer product that is faster for these here",
    ),
    Backend(
        "reference", reference, _reference, FREE,
        "not worth it here for speed: the reference backend is exact but slow",
    ),
)  # fmt: skip


def pick(operation: str, device: torch.device, geometry: Geometry) -> Backend:
    """The first backend that runs `operation` for this layer on this device."""
    if not trial.possible(device):
        return _first(operation, device, geometry)
    found = _kept(operation, device, geometry)
    if not trial.settled():  # memory ran out in a trial, which will be tried again
        _kept.cache_clear()
    return found


def _first(operation: str, device: torch.device, geometry: Geometry) -> Backend:
    return next(b for b in BACKENDS if b.refuse(operation, device, geometry) is None)


_kept = lru_cache(maxsize=4096)(_first)
pick.cache_clear = _kept.cache_clear  # type: ignore[attr-defined]


def costs_of(device: torch.device, geometries: Iterable[Geometry]) -> Costs:
    """Of the backend that most of a model's Linear layers get."""
    linear = [g for g in geometries if not g.is_conv] or [Geometry((1, 1))]
    return Counter(pick(LINEAR_DYNAMIC, device, g) for g in linear).most_common(1)[0][0].costs


def refusals(operation: str, device: torch.device, geometry: Geometry) -> dict[str, str]:
    """Backend name -> why it was passed over, for those before the one that was picked."""
    out = {}
    for backend in BACKENDS:
        reason = backend.refuse(operation, device, geometry)
        if reason is None:
            break
        out[backend.name] = reason
    return out
