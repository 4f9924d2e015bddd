"""Whether Triton works on a device: a small layer is quantized and multiplied there and compared with the reference.

That Triton can be imported says little. It compiles at the first launch, and then needs a C compiler, Python's headers,
a driver that fits and an assembler that knows the GPU.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sysconfig
import threading
from pathlib import Path

import torch

from ...geometry import Geometry, StaticInput
from .. import reference
from .tune import capturing

ROWS, CHANNELS, OUTPUTS = 33, 128, 32  # one row more than a block of 32 holds
# Of a float16 result, relative to the largest: its rounding (2^-11), and that of three float32 operations.
TOLERANCE = 2.0**-10

_found: dict[torch.device, str | None] = {}
_lock = threading.Lock()


def fault(device: torch.device) -> str | None:
    """Why Triton's kernels do not work on `device`, or None.

    Tried once per device and process. Where nothing can be tried (`undecided`) the answer is None and not kept.
    """
    device = _numbered(device)
    if device in _found or not _may_try(device):
        return _found.get(device)
    with _lock:
        if device not in _found:
            try:
                found = _try(device)
            except torch.OutOfMemoryError:  # says nothing about Triton
                return None
            except Exception as error:  # of the compiler, the assembler and the driver: they share no base class
                found = sentence(error)
            if found is not None:
                logging.warning("TFMQ: Triton is not used on %s: %s", device, found)
            _found[device] = found
    return _found[device]


def undecided(device: torch.device) -> bool:
    """Whether a device was not tried yet and cannot be now: a CUDA graph is being captured, or torch.compile traces."""
    return not _may_try(device) and _numbered(device) not in _found


def _may_try(device: torch.device) -> bool:
    if torch.compiler.is_compiling() or (device.type == "cuda" and not torch.cuda.is_available()):
        return False
    return not capturing()


def _numbered(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


@torch.no_grad()
def _try(device: torch.device) -> str | None:
    """What is wrong with the results of one quantization and one product, or None. Raises whatever a launch raises."""
    from . import backend as triton_backend
    from . import launch

    geometry = Geometry((OUTPUTS, CHANNELS))
    # Multipliers without a common factor with the modulus: all codes of -127..127 occur, and no two rows are alike.
    codes = ((torch.arange(OUTPUTS * CHANNELS) * 89 % 255) - 127).to(torch.int8).view(geometry.shape)
    x = (((torch.arange(ROWS * CHANNELS) * 97 % 509) - 254) / 64).to(torch.float16).view(ROWS, CHANNELS)
    scale = torch.arange(1, OUTPUTS + 1) / 1024
    grid = StaticInput(torch.tensor([1 / 32]), torch.tensor([117], dtype=torch.int32), None)
    truth = reference.prepare(codes, scale, geometry)
    wanted = reference.quantize_static(x, truth, grid)
    result = reference.multiply(wanted, truth, None).float()

    there = StaticInput(grid.scale.to(device), grid.zero_point.to(device), None)
    weight = triton_backend.prepare(codes.to(device), scale.to(device), geometry)
    q = launch.quantize_matrix(x.to(device), there, weight.channels)
    y = launch.product(q, weight, there, None, None, torch.float16, tile=launch.smallest_tile(device))
    wrong = int((q.cpu().int() + 128 != wanted.values.int()).sum())
    if wrong:
        return f"Triton quantizes wrongly here ({wrong} of {q.numel()} codes)"
    far = int((y.cpu().float() - result).abs().gt(TOLERANCE * result.abs().max()).sum())
    return f"Triton computes wrong sums here ({far} of {y.numel()})" if far else None


def sentence(error: Exception) -> str:
    """What a person can do about a launch that raised."""
    text = " ".join(str(error).split())
    said = text if len(text) <= 160 else f"{text[:160]}..."
    if isinstance(error, FileNotFoundError) or "C compiler" in text:
        return f"Triton cannot compile here: no C compiler (install gcc, or name one in the variable CC): {said}"
    if isinstance(error, subprocess.CalledProcessError):
        headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if not headers.exists():
            return f"Triton cannot compile here: Python's headers are missing (install python3-dev): no {headers}"
        compiler = error.cmd[0] if isinstance(error.cmd, (list, tuple)) else shutil.which("gcc")
        return f"Triton cannot compile here: {compiler} failed (exit code {error.returncode})"
    return f"Triton cannot run here ({type(error).__name__}: {said})"
