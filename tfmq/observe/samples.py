"""Samples: a balanced choice of the rows of model calls that a calibration saw, for what needs whole inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROWS = 512
BYTES = 64 << 20
Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class CallSample:
    """One row of a model call. x: latents without the batch dimension; sigma; interval of the time axis; branch
    (`branches`); run: number of the prompt; conditions: what else the model was called with, name -> tensor without
    the batch dimension, or scalar. Rows share tensors that are equal."""

    x: Tensor
    sigma: float
    interval: int
    branch: int
    run: int
    conditions: Mapping[str, Tensor | Scalar]

    @property
    def shape(self) -> Hashable:
        """Rows of one shape can be stacked."""
        names = sorted(self.conditions.items())
        return tuple(self.x.shape), tuple((n, tuple(v.shape) if isinstance(v, Tensor) else v) for n, v in names)


@dataclass(frozen=True)
class Samples:
    """rows: the choice. skipped: reason -> calls that could not be recorded."""

    rows: tuple[CallSample, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and a JSON value for a file; each distinct tensor once."""
        shapes: dict[tuple[Any, ...], list[Tensor]] = {}
        pool: dict[int, tuple[int, Tensor]] = {}
        rows: list[list[Any]] = []
        for row in self.rows:
            stack = shapes.setdefault((row.x.dtype, *row.x.shape), [])
            stack.append(row.x)
            conditions: dict[str, dict[str, Any]] = {}
            for name, value in row.conditions.items():
                if isinstance(value, Tensor):
                    number, _ = pool.setdefault(id(value), (len(pool), value))
                    conditions[name] = {"tensor": number}
                else:
                    conditions[name] = {"value": value}
            group = list(shapes).index((row.x.dtype, *row.x.shape))
            rows.append([group, len(stack) - 1, row.sigma, row.interval, row.branch, row.run, conditions])
        found = {f"x{i}": torch.stack(stack) for i, stack in enumerate(shapes.values())}
        found |= {f"condition{number}": value for number, value in pool.values()}
        return found, {"rows": rows, "skipped": dict(self.skipped)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Samples:
        """The inverse of `tensors`. Raises KeyError, TypeError or ValueError for what it cannot have written."""
        rows = []
        for group, place, sigma, interval, branch, run, conditions in about["rows"]:
            values = {
                name: tensors[f"condition{one['tensor']}"] if "tensor" in one else one["value"]
                for name, one in conditions.items()
            }
            x = tensors[f"x{group}"][place]
            rows.append(CallSample(x, float(sigma), int(interval), int(branch), int(run), values))
        return cls(tuple(rows), {str(k): int(v) for k, v in about["skipped"].items()})

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """x float [B, ...], sigma float32 [B] and the conditions of rows of one shape, as the model is called."""
        rows = [self.rows[i] for i in indices]
        conditions = {
            name: _stacked([row.conditions[name] for row in rows]) if isinstance(value, Tensor) else value
            for name, value in rows[0].conditions.items()
        }
        sigma = torch.tensor([row.sigma for row in rows], dtype=torch.float32)
        return torch.stack([row.x for row in rows]).float(), sigma, conditions


class Collector:
    """Chooses rows out of a stream of calls, evenly over intervals and branches, at random within each.

    At most `limit` rows and `most` bytes; where the bytes are used up, rows with new tensors are passed over.
    """

    def __init__(self, limit: int = ROWS, most: int = BYTES, seed: int = 0) -> None:
        self.limit, self.most = limit, most
        self.cells: dict[tuple[int, int], list[tuple[float, CallSample, tuple[str, ...]]]] = {}
        self.pool: dict[str, tuple[Tensor, int]] = {}
        self.nbytes = self.count = 0
        self.skipped: dict[str, int] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def skip(self, reason: str) -> None:
        """A call that cannot be recorded."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def offer(
        self, x: Tensor, sigma: Tensor, interval: int, branches: Sequence[int], run: int, conditions: Mapping[str, Any]
    ) -> None:
        """A call. x [B, ...]; sigma [B] or [1]; branches: as in `Clock.set`; conditions: tensors [B, ...], scalars."""
        b = x.shape[0]
        if x.is_nested or b == 0 or b % len(branches):
            return self.skip("latents of several sizes")
        for name, value in conditions.items():
            if isinstance(value, Tensor):
                if value.is_nested or value.dim() == 0 or value.shape[0] != b:
                    return self.skip(f"{name} is not one tensor per picture")
            elif not isinstance(value, Scalar):
                return self.skip(f"{name} is a {type(value).__name__}")
        keys = torch.rand(b, generator=self.generator).tolist()
        sigmas = sigma.detach().float().cpu().expand(b).tolist()
        for row in range(b):
            cell = (interval, int(branches[row * len(branches) // b]))
            if not self._wanted(cell, keys[row]):
                continue
            parts = {n: v[row] if isinstance(v, Tensor) else v for n, v in conditions.items()}
            self._insert(cell, keys[row], x[row], sigmas[row], run, parts)
        return None

    def samples(self) -> Samples:
        """The choice, in the order of intervals, branches and time of arrival."""
        rows = [entry[1] for cell in sorted(self.cells) for entry in self.cells[cell]]
        return Samples(tuple(rows), dict(self.skipped))

    def _wanted(self, cell: tuple[int, int], key: float) -> bool:
        if self.count < self.limit:
            return True
        own = self.cells.get(cell, [])
        largest = max(len(entries) for entries in self.cells.values())
        return len(own) < largest or key < max(entry[0] for entry in own)

    def _insert(
        self, cell: tuple[int, int], key: float, x: Tensor, sigma: float, run: int, conditions: dict[str, Any]
    ) -> None:
        digests = {n: _digest(v) for n, v in conditions.items() if isinstance(v, Tensor)}
        fresh = sum(conditions[n].nbytes for n, digest in digests.items() if digest not in self.pool)
        if self.nbytes + fresh + x.nbytes > self.most:
            self.skipped["the samples are full"] = self.skipped.get("the samples are full", 0) + 1
            return
        kept: dict[str, Tensor | Scalar] = dict(conditions)
        for name, digest in digests.items():
            if digest not in self.pool:
                self.pool[digest] = (_copied(conditions[name]), 0)
                self.nbytes += self.pool[digest][0].nbytes
            tensor, uses = self.pool[digest]
            self.pool[digest] = (tensor, uses + 1)
            kept[name] = tensor
        sample = CallSample(_copied(x), sigma, cell[0], cell[1], run, kept)
        self.nbytes += sample.x.nbytes
        self.cells.setdefault(cell, []).append((key, sample, tuple(digests.values())))
        self.count += 1
        if self.count > self.limit:
            self._evict()

    def _evict(self) -> None:
        entries = max(self.cells.values(), key=len)
        entry = max(entries, key=lambda e: e[0])
        entries.remove(entry)
        self.count -= 1
        self.nbytes -= entry[1].x.nbytes
        for digest in entry[2]:
            tensor, uses = self.pool[digest]
            if uses == 1:
                del self.pool[digest]
                self.nbytes -= tensor.nbytes
            else:
                self.pool[digest] = (tensor, uses - 1)


def _stacked(values: Sequence[Any]) -> Tensor:
    tensors = [value.float() if value.dtype in (torch.float16, torch.bfloat16) else value for value in values]
    return torch.stack(tensors)


def _copied(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return tensor.detach().cpu().clone()


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + flat.numpy().tobytes()).hexdigest()
