"""What a small layer tells of a backend before a model is given to it.

That a package can be imported says little. Triton compiles at the first launch, and then needs a C compiler, Python's
headers, a driver that fits and an assembler that knows the GPU; kernels of another package may not run on this one.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..geometry import Geometry, StaticInput
from . import reference
from .triton.tune import capturing, untimed

ROWS, CHANNELS, OUTPUTS = 40, 64, 48
OPERATIONS = "linear_static", "linear_dynamic", "conv2d_static"
TOLERANCE = 2e-3  # norm of the error over that of the result; float16 rounds it to 3e-4

OUT_OF_MEMORY = "out of memory", "ALLOC_FAILED"  # in errors of Triton's loader and of cuBLAS
_found: dict[Hashable, Any] = {}
_open: set[Hashable] = set()  # questions whose trial was begun and said nothing
_lock = threading.RLock()  # a trial may ask for another


def possible(device: torch.device) -> bool:
    """Whether anything can be tried on a device now: not while a CUDA graph is captured, nor while torch.compile
    traces, whose graph would take the trial in."""
    if torch.compiler.is_compiling() or (device.type == "cuda" and not torch.cuda.is_available()):
        return False
    return not capturing()


def once(question: Hashable, attempt: Callable[[], Any], device: torch.device) -> Any:
    """What `attempt` returns, called once per process. Where it cannot be called (`possible`): None, which is not kept.

    Raises what `attempt` raises, and then calls it again the next time.
    """
    if question in _found or not possible(device):
        return _found.get(question)
    with _lock:
        if question not in _found:
            _open.add(question)
            _found[question] = attempt()
            _open.discard(question)
    return _found[question]


def settled() -> bool:
    """Whether every trial that was begun has said something: what is picked meanwhile holds for good."""
    return not _open


def fault(
    name: str, backend: ModuleType, device: torch.device, operations: tuple[str, ...] = OPERATIONS,
    tolerance: float = TOLERANCE,
) -> str | None:  # fmt: skip
    """Why a backend does not work on a device, or None; None too where nothing can be tried.

    operations: those of the backend that are tried, as far as it has them.
    """
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())

    def attempt() -> str | None:
        try:
            found = [_wrong(backend, one, device, tolerance) for one in operations if hasattr(backend, one)]
            reason = next(filter(None, found), None)
        except torch.OutOfMemoryError:  # says nothing about the backend
            raise
        except Exception as error:  # of a compiler, an assembler, a driver: they share no base class
            if any(word in str(error) for word in OUT_OF_MEMORY):
                raise torch.OutOfMemoryError(str(error)) from error
            reason = sentence(error)
        if reason is not None:
            logging.warning("TFMQ: %s is not used on %s: it %s", name, device, reason)
        return reason

    try:
        return once((name, device), attempt, device)  # type: ignore[no-any-return]
    except torch.OutOfMemoryError:
        return None


@torch.no_grad()
def _wrong(backend: ModuleType, operation: str, device: torch.device, tolerance: float) -> str | None:
    """What is wrong with the result of a small layer, or None. Raises whatever the backend raises."""
    g = torch.Generator().manual_seed(0)
    conv = operation == "conv2d_static"
    geometry = Geometry((OUTPUTS, CHANNELS, 3, 3), padding=(1, 1)) if conv else Geometry((OUTPUTS, CHANNELS))
    codes = torch.randint(-127, 128, geometry.shape, generator=g).to(torch.int8)
    scale, bias = torch.rand(OUTPUTS, generator=g) * 0.01 + 0.001, torch.randn(OUTPUTS, generator=g).half()
    x = torch.randn((1, CHANNELS, 8, 5) if conv else (ROWS, CHANNELS), generator=g).half()
    inverse = torch.rand(CHANNELS, generator=g) + 0.5
    grid = StaticInput(torch.tensor([0.05]), torch.tensor([120], dtype=torch.int32), inverse)  # clips nothing

    def run(backend: Any, x: Tensor, device: torch.device) -> Tensor:
        ready = backend.prepare(codes.to(device), scale.to(device), geometry)
        there = StaticInput(*(part.to(device) for part in grid if part is not None))
        how = there if operation != "linear_dynamic" else there.inverse_balance
        return getattr(backend, operation)(x.to(device), ready, how, bias.to(device)).float().cpu()  # type: ignore[no-any-return]

    truth = run(reference, x.float(), torch.device("cpu"))
    with untimed():
        error = float((run(backend, x, device) - truth).norm() / truth.norm())
    return None if error <= tolerance else f"computes wrongly here (error of {error:.2g} in a small {operation})"


def sentence(error: Exception) -> str:
    """What a person can do about a trial that raised."""
    text = " ".join(str(error).split())
    said = text if len(text) <= 160 else f"{text[:160]}..."
    if isinstance(error, FileNotFoundError) or "C compiler" in text:
        return f"cannot compile here: no C compiler (install gcc, or name one in the variable CC): {said}"
    if isinstance(error, subprocess.CalledProcessError):
        headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if not headers.exists():
            return f"cannot compile here: Python's headers are missing (install python3-dev): no {headers}"
        compiler = error.cmd[0] if isinstance(error.cmd, (list, tuple)) else shutil.which("gcc")
        return f"cannot compile here: {compiler} failed (exit code {error.returncode})"
    return f"cannot run here ({type(error).__name__}: {said})"
