"""Machine code for a GPU that need not be here, and what the assembler says of it. Needs Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Usage(NamedTuple):
    """Of a thread: registers; bytes on the stack (where what does not fit into registers goes) and in local memory."""

    registers: int
    stack: int
    local: int


def compile_for(
    kernel: Any, capability: int, signature: Mapping[str, str], constants: Mapping[str, Any], aligned: Iterable[str],
    options: Mapping[str, Any],
) -> Any:  # fmt: skip
    """Triton's compiled kernel. capability: 90 is 9.0. signature: type of every argument, "constexpr" for those in
    `constants`; aligned: arguments that divide by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, dict(signature), fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


def usage(built: Any) -> Usage:
    """What `cuobjdump` reads of a compiled kernel. Raises OSError or CalledProcessError where it does not run."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        said = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", said)
    if found is None:
        raise OSError(f"cuobjdump said: {said[:200]}")
    return Usage(*map(int, found.groups()))


def instruction(built: Any) -> str | None:
    """Which tensor core instruction multiplies int8 in a compiled kernel, or None."""
    lines = [line for line in str(built.asm.get("ptx", "")).splitlines() if ".s32.s8.s8" in line]
    return next((name for name in ("wgmma", "tcgen05", "mma.sync") if any(name in line for line in lines)), None)
