"""Triton's interpreter with numpy from 2.4 on, where Triton before 3.7 fails in it.

Numpy 2.4 no longer turns an array of one entry into a Python number ("only 0-dimensional arrays can be converted"), and
the interpreter holds every scalar as such an array; Triton 3.7 squeezes it first.
"""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Let a scalar of the interpreter be a Python number, with any numpy. To be called before the first launch."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if getattr(patch, "mended", False):
        return

    def patch_with_index(tensor: Any, *scope: Any) -> None:
        """scope: what takes the patches back after a launch, in the versions that do so."""
        patch(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", _index)
        else:
            tensor.__index__ = _index

    patch_with_index.mended = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch_with_index


def _index(scalar: Any) -> int:
    return int(scalar.handle.data.item())
