"""A backend tried on the device before a model is given to it."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from ..geometry import Geometry, StaticInput
from . import reference

ROWS, CHANNELS, OUTPUTS = 40, 64, 48


@lru_cache
def trial(module: str, device: torch.device, tolerance: float = 2e-3) -> str | None:
    """Why a small layer of each kind does not come out right, or None.

    module: of a backend. tolerance: norm of the error over that of the result; float16 rounds it to 3e-4.
    """
    try:
        backend = import_module(module)
        for name in ("linear_static", "linear_dynamic", "conv2d_static"):
            if hasattr(backend, name) and not _runs(backend, name, device, tolerance):
                return "a small layer came out wrong when it was tried"
    except Exception as error:  # compilers and drivers fail in many ways
        text = (str(error).strip().splitlines() or [""])[0][:200]
        return f"a small layer failed when it was tried ({type(error).__name__}: {text})"
    return None


def _runs(backend: object, name: str, device: torch.device, tolerance: float) -> bool:
    g = torch.Generator().manual_seed(0)
    conv = name == "conv2d_static"
    geometry = Geometry((OUTPUTS, CHANNELS, 3, 3), padding=(1, 1)) if conv else Geometry((OUTPUTS, CHANNELS))
    codes = torch.randint(-127, 128, geometry.shape, generator=g).to(torch.int8)
    scale, bias = torch.rand(OUTPUTS, generator=g) * 0.01 + 0.001, torch.randn(OUTPUTS, generator=g).half()
    x = torch.randn((1, CHANNELS, 8, 5) if conv else (ROWS, CHANNELS), generator=g).half()
    inverse = torch.rand(CHANNELS, generator=g) + 0.5
    grid = StaticInput(torch.tensor([0.05]), torch.tensor([120], dtype=torch.int32), inverse)  # clips nothing

    def run(backend: object, x: Tensor, device: torch.device) -> Tensor:
        ready = backend.prepare(codes.to(device), scale.to(device), geometry)  # type: ignore[attr-defined]
        there = StaticInput(*(part.to(device) for part in grid if part is not None))
        how = there if name != "linear_dynamic" else there.inverse_balance
        return getattr(backend, name)(x.to(device), ready, how, bias.to(device)).float().cpu()

    truth = run(reference, x.float(), torch.device("cpu"))
    return bool((run(backend, x, device) - truth).norm() <= tolerance * truth.norm())
