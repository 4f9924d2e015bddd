"""Triton's kernels on CPU tensors, in Triton's interpreter, as a GPU would compute."""

import os
from typing import Any

SWITCH = "TRITON_INTERPRET"


def install() -> None:
    """Make the Triton backend take CPU tensors. The process must have had the switch before Triton was imported."""
    import numpy as np

    assert os.environ.get(SWITCH) == "1"
    import triton.language as tl
    from triton.runtime import interpreter

    from bench.interpreter import mend
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
