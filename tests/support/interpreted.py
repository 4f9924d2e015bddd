"""A pytest plugin: the Triton backend on CPU tensors, in Triton's interpreter.

Load it with `-p support.interpreted` into a process of its own that has TRITON_INTERPRET=1 from its start on.
"""

import os

import numpy as np

assert os.environ.get("TRITON_INTERPRET") == "1"

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from tfmq.kernels import table, triton_backend, triton_int_mm  # noqa: E402

for backend in (triton_backend, triton_int_mm):
    backend.missing = lambda device: None if device.type == "cpu" else "only in the interpreter"
table.slower = lambda *_: None

_convert = interpreter._convert_float


def _rounded(data, source, target, mode):
    """The interpreter cuts digits off where a GPU rounds to the nearest bfloat16."""
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).reshape(data.shape)
    return _convert(data, source, target, mode)


interpreter._convert_float = _rounded
