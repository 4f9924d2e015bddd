"""A part of a network whose activations are dropped and computed again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import tree


class Recomputed(torch.autograd.Function):
    """A unit as a function of tensors that is run again in backward. box: takes the tree that it gives back.

    torch's own checkpointing does not notice a unit that writes in place to what its gradient needs (Flux); here such a
    one is repeated with copies.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[[Sequence[Tensor]], Any], box: list[Any], *values: Tensor) -> Any:
        ctx.run = run
        ctx.save_for_backward(*values)
        box.append(run(values))
        return tuple(tree.outputs(box[0]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        needed = ctx.needs_input_grad[2:]

        def again() -> Iterator[Tensor | None]:
            values = [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=True)]
            with torch.enable_grad():
                found = tree.outputs(ctx.run(values))
            pairs = [(y, g) for y, g in zip(found, gradients, strict=True) if g is not None and y.requires_grad]
            wanted = [value for value, n in zip(values, needed, strict=True) if n]
            if not pairs or not wanted:
                return iter([None] * len(wanted))
            ys, gs = zip(*pairs, strict=True)
            return iter(torch.autograd.grad(ys, wanted, gs, allow_unused=True))

        try:
            result = again()
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            with torch.autograd.graph.allow_mutation_on_saved_tensors():
                result = again()
        return None, None, *(next(result) if n else None for n in needed)
