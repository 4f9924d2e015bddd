"""A pytest plugin: the Triton backend on CPU tensors, in Triton's interpreter.

Load it with `-p support.interpreted` into a process of its own that has TRITON_INTERPRET=1 from its start on.
"""

from bench.gpu import interpreted

interpreted.install()
