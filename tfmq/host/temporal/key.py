"""What the temporal features of a call of the network depend on, and which calls a run has still to make."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import torch
from torch import Tensor

_OF_TOKENS = {"attention_mask", "num_tokens"}  # of prompts that differ in nothing that matters here


@dataclass(frozen=True)
class Key:
    """t: bits of the timesteps of all rows. of: what else moves features (vectors, rows, dtype, device, patches)."""

    t: bytes
    of: Hashable

    @classmethod
    def at(cls, t: Tensor, of: Hashable) -> Key:
        return cls(t.detach().contiguous().cpu().numpy().tobytes(), of)


def as_given(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A conditioning value as the network gets it (as the host's BaseModel does it)."""
    if isinstance(value, list):
        return [comfy.model_base.convert_tensor(v, dtype, device) for v in value]
    return comfy.model_base.convert_tensor(value, dtype, device)


def timestep(base: Any, x: Tensor, sigma: Tensor, conds: dict[str, Any]) -> Tensor:
    t = base.model_sampling.timestep(sigma).float()
    return base.process_timestep(t, x=x, **conds)  # type: ignore[no-any-return]


def to_come(
    base: Any, x: Tensor, sigma: Tensor, sigmas: Tensor | None, conds: dict[str, Any], of: Hashable
) -> dict[Key, Tensor]:
    """Key and timesteps of the calls that the rest of this run will make on the grid, nearest first."""
    if sigmas is None:
        return {}
    now = float(sigma[0])
    grid = sigmas.to(sigma).flatten()
    values = [value for value, plain in zip(grid, grid.tolist(), strict=True) if 0.0 < plain <= now]
    times = [timestep(base, x, value * torch.ones_like(sigma), conds) for value in values]
    rows = torch.stack(times).cpu() if times else ()  # one transfer for all
    return {Key.at(row, of): t for row, t in zip(rows, times, strict=True)}


def digest_of(conds: dict[str, Any]) -> bytes:
    """Hash of what else the network gets: vectors by their bits; of tokens and pictures, which no projection sees, only
    that they are there."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.ndim}{value.dtype}".encode())
            if value.ndim <= 2:
                digest.update(f"{tuple(value.shape)}".encode())
                digest.update(value.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes())
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode() if isinstance(value, (str, int, float, bool, type(None))) else b"?")

    for name in sorted(conds.keys() - _OF_TOKENS):
        digest.update(name.encode())
        add(conds[name])
    return digest.digest()
