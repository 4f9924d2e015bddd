"""Which backends can run what in this process: what cannot be here is not a case, so that a skip means something."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from tfmq.geometry import Geometry
from tfmq.kernels.table import BACKENDS, CONV2D_STATIC, Backend

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def plain(operation: str) -> Geometry:
    """A layer that every backend with this operation takes."""
    return Geometry((16, 16, 1, 1) if operation == CONV2D_STATIC else (16, 16))


def able(operation: str, device: str = "cpu", geometry: Geometry | None = None) -> list[Backend]:
    """Backends that run the operation here; geometry: of another layer than the plainest."""
    wanted = plain(operation) if geometry is None else geometry
    return [b for b in BACKENDS if b.refuse(operation, torch.device(device), wanted) is None]


def each(operations: Iterable[str], **named: Any) -> pytest.MarkDecorator:
    """Parametrize `operation` and `backend` with all pairs that run here. named: of `able`."""
    cases = [(operation, backend) for operation in operations for backend in able(operation, **named)]
    ids = [f"{operation}-{backend.name}" for operation, backend in cases]
    return pytest.mark.parametrize(("operation", "backend"), cases, ids=ids)
