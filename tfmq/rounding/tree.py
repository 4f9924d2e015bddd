"""Arguments and results of a module as trees: tensors inside tuples, lists and dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same tree with every tensor replaced by change(tensor); containers are new, all else is shared."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [map_tensors(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [map_tensors(part, change) for part in value]
    if type(value) is dict:
        return {key: map_tensors(part, change) for key, part in value.items()}
    return value


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a tree, depth first."""
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def outputs(result: Any) -> list[Tensor]:
    """The floating tensors that a module gives back."""
    return [tensor for tensor in tensors(result) if tensor.is_floating_point()]


def nbytes(value: Any) -> int:
    """Bytes of the distinct tensors of a tree."""
    return sum({id(t): t.nbytes for t in tensors(value)}.values())


def concatenate(trees: list[Any], sizes: list[int]) -> Any:
    """One tree out of those of several batches; tensor i of batch j has m * sizes[j] rows where it is per row.

    Tensors that are not per row are taken from the first. Trees of one structure only.
    """
    columns = [tensors(tree) for tree in trees]
    joined = iter([_joined([column[i] for column in columns], sizes) for i in range(len(columns[0]))])
    return map_tensors(trees[0], lambda _: next(joined))


def per_row(tensor: Tensor, rows: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] > 0 and tensor.shape[0] % rows == 0


def take(tree: Any, rows: Tensor, of: int) -> Any:
    """The given rows (int64 [b]) of every tensor that is per row, of a tree of `of` rows; new tensors."""

    def pick(tensor: Tensor) -> Tensor:
        if not per_row(tensor, of):
            return tensor.clone()
        each = tensor.shape[0] // of
        if each == 1:
            return tensor[rows]
        return tensor.view(of, each, *tensor.shape[1:])[rows].flatten(0, 1)

    return map_tensors(tree, pick)


def _joined(parts: list[Tensor], sizes: list[int]) -> Tensor:
    if all(per_row(part, size) for part, size in zip(parts, sizes, strict=True)):
        return torch.cat(parts)
    return parts[0]
