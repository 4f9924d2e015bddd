"""Triton's kernels on CPU tensors, in Triton's interpreter, as a GPU would compute.

Before Triton 3.7 the interpreter fails with numpy from 2.4 on, which no longer turns an array of one entry into a
Python number ("only 0-dimensional arrays can be converted"): it holds every scalar as such an array.
"""

import os
from typing import Any

SWITCH = "TRITON_INTERPRET"


def install() -> None:
    """Make the Triton backend take CPU tensors. The process must have had the switch before Triton was imported."""
    import numpy as np

    assert os.environ.get(SWITCH) == "1"
    import triton.language as tl
    from triton.runtime import interpreter

    from tfmq.kernels import table
    from tfmq.kernels.triton import backend as triton_backend
    from tfmq.kernels.triton import int_mm as triton_int_mm

    mend()
    modules: tuple[Any, ...] = (triton_backend, triton_int_mm)
    for module in modules:
        module.missing = lambda device: None if device.type == "cpu" else "only in the interpreter"
    shared: Any = table
    shared.slower = lambda *_: None  # whether a GPU gains by it is not the question here
    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        """The interpreter cuts digits off where a GPU rounds to the nearest bfloat16."""
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).reshape(data.shape)
        return convert(data, source, target, mode)

    interpreter._convert_float = rounded


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
