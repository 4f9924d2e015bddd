"""Hashes by content: of weights, conditionings, and whatever nodes hang on a MODEL."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

SAMPLES = 64  # entries of each weight that are looked at
DEPTH = 5  # of objects within objects
PLAIN = str, bytes, int, float, bool, complex, type(None), Enum, torch.dtype, torch.device, np.generic
# What a run leaves behind in ControlNets, hooks, their keyframes, and context windows; and what begins with `_curr`.
VOLATILE = {
    "cond_hint", "timestep_range", "curr_t", "start_t", "_step", "_model", "_skip_adding", "encoded_image",
    "encoded_image_size", "model_sampling_current",
}  # fmt: skip


def update_digest(digest: Any, value: Any, samples: int | None = None) -> None:
    """Hash tensors by content (all of it, or `samples` entries spread over it), containers, functions and objects by
    what they hold. Modules of Python, classes and what lies deeper than DEPTH objects count by name alone."""
    digest.update(_Hashes(samples).of(value, DEPTH))


class _Hashes:
    """Each object is hashed once, however often it is met, and kept so that its id stays its own."""

    def __init__(self, samples: int | None) -> None:
        self.samples = samples
        self.known: dict[int, tuple[Any, bytes]] = {}

    def of(self, value: Any, depth: int) -> bytes:
        if isinstance(value, PLAIN):
            return repr(value).encode()
        if id(value) in self.known:
            return self.known[id(value)][1]
        self.known[id(value)] = value, b"above"  # while it is looked into, and holds itself
        # A weight is the same weight as a Parameter and as a plain tensor.
        kind = Tensor if isinstance(value, Tensor) else type(value)
        found = hashlib.sha256(kind.__qualname__.encode())
        for part in self.parts(value, depth):
            found.update(part)
        self.known[id(value)] = value, found.digest()
        return found.digest()

    def parts(self, value: Any, depth: int) -> Iterator[bytes]:
        if isinstance(value, Tensor):
            yield _content(value, self.samples)
        elif isinstance(value, np.ndarray):
            yield f"{value.dtype}{value.shape}".encode() + (value.tobytes() if value.dtype != object else b"")
        elif isinstance(value, dict):
            for key in sorted(value, key=_key):
                yield _key(key).encode()
                yield self.of(value[key], depth)
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield self.of(item, depth)
        elif isinstance(value, (set, frozenset)):
            yield from (key.encode() for key in sorted(map(_key, value)))
        elif isinstance(value, (ModuleType, BuiltinFunctionType, type)):
            yield str(getattr(value, "__qualname__", getattr(value, "__name__", ""))).encode()
        elif depth:
            yield from self.inside(value, depth - 1)

    def inside(self, value: Any, depth: int) -> Iterator[bytes]:
        """Of an object that is no container."""
        if isinstance(value, logging.Logger):
            return
        if isinstance(value, ModelPatcher):
            yield self.of(value.model, depth)
        elif isinstance(value, nn.Module):
            for name, weight in sorted(value.state_dict().items()):
                yield name.encode()
                yield _content(weight, SAMPLES) if isinstance(weight, Tensor) else b""
        elif isinstance(value, partial):
            yield self.of((value.func, value.args, value.keywords), depth)
        elif isinstance(value, MethodType):
            yield value.__func__.__qualname__.encode()
            yield self.of(value.__self__, depth)
        elif isinstance(value, FunctionType):
            yield value.__qualname__.encode()
            cells = [_filling(cell) for cell in value.__closure__ or ()]
            yield self.of([cells, value.__defaults__, value.__kwdefaults__], depth)
        else:
            held = getattr(value, "__dict__", {})
            kept = {n: part for n, part in held.items() if n not in VOLATILE and not n.startswith("_curr")}
            yield self.of(kept, depth)


def _content(tensor: Tensor, samples: int | None) -> bytes:
    shape = f"{tuple(tensor.shape)}".encode()
    if isinstance(tensor, QuantizedTensor):
        tensor = tensor._qdata
    if tensor.device.type == "meta":
        return shape
    flat = tensor.detach().reshape(-1)
    if samples is not None and flat.numel() > samples:
        flat = flat[:: flat.numel() // samples]
    return shape + flat.cpu().double().numpy().tobytes()


def _key(key: Any) -> str:
    """Of a dict, without the address that an object's own text would show."""
    if isinstance(key, tuple):
        return ",".join(map(_key, key))
    return str(key) if isinstance(key, PLAIN) else type(key).__qualname__


def _filling(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
