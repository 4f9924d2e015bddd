"""Codes of a weight that lie in memory only once, in a kernel's own order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_SAME = ("aten::detach", "aten::alias")
_MOVES = ("aten::to", "aten::_to_copy")


class PackedCodes(Tensor):
    """int8 codes [N, K, ...] that a kernel holds in its own order; `ready` is that form, `owner` who made it.

    Whatever is done to them sees plain codes, made anew each time: slow, and meant for moving, saving and patching a
    weight. No other codes can be written to them.
    """

    ready: Any
    owner: Any
    _restore: Callable[[Any], Tensor]

    @staticmethod
    def __new__(cls, codes: Tensor, owner: Any, ready: Any, restore: Callable[[Any], Tensor]) -> PackedCodes:
        # Torch cannot detach a wrapper in inference mode that was made outside of it; one made inside is good for both.
        with torch.inference_mode():
            return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
                cls, codes.shape, dtype=codes.dtype, device=codes.device
            )

    def __init__(self, codes: Tensor, owner: Any, ready: Any, restore: Callable[[Any], Tensor]) -> None:
        """codes: the plain ones; not kept. restore: makes them again from `ready`."""
        self.owner, self.ready, self._restore = owner, ready, restore

    def permuted(self, *dims: int) -> PackedCodes:
        """The same codes with their dimensions in another order."""
        restore, shape = self._restore, [self.shape[d] for d in dims]
        like = torch.empty((), dtype=self.dtype, device=self.device).expand(shape)
        return PackedCodes(like, self.owner, self.ready, lambda ready: restore(ready).permute(dims).contiguous())

    def plain(self) -> Tensor:
        """The codes as an ordinary tensor, a new one."""
        return self._restore(self.ready)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, PackedCodes):
            name = func._schema.name
            if name in _SAME or (name in _MOVES and not _changes(args[1:], kwargs or {})):
                return PackedCodes(first, first.owner, first.ready, first._restore)
            # The host puts back what it saved before a hook; it is what is there.
            if name == "aten::copy_" and torch.equal(first.plain(), plain(args[1])):
                return first
            if func._schema.is_mutable:
                raise RuntimeError("codes in a kernel's own order cannot be written to: replace the weight")
        args, kwargs = tree_map_only(PackedCodes, PackedCodes.plain, (args, kwargs or {}))
        return func(*args, **kwargs)

    def data_ptr(self) -> int:
        return 0  # there is no storage of plain codes

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.plain()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedCodes({tuple(self.shape)})"


def plain(codes: Tensor) -> Tensor:
    """Codes as an ordinary tensor, whatever they are."""
    return codes.plain() if isinstance(codes, PackedCodes) else codes


def _changes(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a move with these arguments leads to another device or type; what it would copy cannot be written to."""
    wanted = (*args, *kwargs.values())
    return any(isinstance(w, torch.device) and w.type != "cpu" for w in wanted) or any(
        isinstance(w, torch.dtype) and w != torch.int8 for w in wanted
    )
