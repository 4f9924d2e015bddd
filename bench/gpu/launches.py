"""What our launch code launches: kept instead, compiled for a GPU that need not be here, or run with a tile of one's
choice. Needs Triton, though not to be imported."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from tfmq.kernels.triton.tune import Tile


class Built(NamedTuple):
    """What became of a launch. seconds: of compiling; shared: bytes of a block's memory; instruction: which tensor core
    instruction multiplies int8, or None. registers: of a thread; spilled: bytes of its stack and its local memory; None
    where they cannot be read, for the reason in `unread`."""

    seconds: float
    shared: int
    instruction: str | None
    ptx: str
    registers: int | None = None
    spilled: int | None = None
    unread: str | None = None


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was called with. `name` tells it from all others that compile to something else."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]  # constants and the compiler's

    @property
    def name(self) -> str:
        constants = {n.lower(): v for n, v in self.options.items() if n in self.kernel.arg_names and n != "SWIZZLE"}
        short = [n if v is True else f"{n}={v}" for n, v in constants.items() if v is not False]
        more = [f"{n[4:]}={v}" for n, v in self.options.items() if n in ("num_warps", "num_stages")]
        given = []
        for parameter, argument in zip(self.kernel.params, self.args, strict=False):
            name, general = parameter.name, parameter.do_not_specialize
            kind = str(argument.dtype).removeprefix("torch.") if isinstance(argument, torch.Tensor) else argument
            if name in ("x", "out", "bias") or (isinstance(argument, int) and argument == 1 and not general):
                given.append(f"{name}={kind}")
            elif argument is None and name in ("inverse", "gain", "partial", "factor"):
                given.append(f"no {name}")
            elif not general and not _aligned(argument):
                given.append(f"{name} odd")
        return f"{self.kernel.__name__.removesuffix('_kernel')} {' '.join([*short, *more, *given])}"

    def compile(self, capability: int | None) -> Built:
        """For the GPU of this process (None), so that its launches find it done, or for another. Raises what the
        compiler raises, and for this GPU what loading the machine code raises."""
        with nullcontext() if capability is None else abroad(capability):
            started = time.perf_counter()
            built = self.kernel.run(*self.args, grid=(1, 1, 1), warmup=True, **self.options)
            seconds = time.perf_counter() - started
        if capability is None and hasattr(built, "_init_handles"):
            built._init_handles()
        ptx = str(built.asm.get("ptx", ""))
        lines = [line for line in ptx.splitlines() if ".s32.s8.s8" in line]
        kinds = (name for name in ("wgmma", "tcgen05", "mma.sync") if any(name in line for line in lines))
        found = Built(seconds, int(built.metadata.shared), next(kinds, None), ptx)
        try:
            registers, stack, local = _usage(built.asm["cubin"])
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            return found._replace(unread=str(error)[:200])
        return found._replace(registers=registers, spilled=stack + local)


def _aligned(argument: Any) -> bool:
    """Whether the compiler is told that it divides by 16, or nothing."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr() % 16 == 0
    return not isinstance(argument, int) or argument % 16 == 0


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers of a thread, bytes of its stack, bytes of local memory. By Triton's own cuobjdump, else a toolkit's."""
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(own) if own.is_file() else shutil.which("cuobjdump")
    if tool is None:
        raise OSError("there is no cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", done.stdout)
    if found is None:
        raise ValueError("no resources in " + done.stdout[-200:])
    registers, stack, local = map(int, found.groups())
    return registers, stack, local


@contextmanager
def abroad(capability: int) -> Iterator[None]:
    """Within, Triton compiles for a GPU of this compute capability; 90 is 9.0."""
    from triton.runtime import driver

    before = driver._active if hasattr(driver, "_active") else driver.active
    driver.set_active(_Driver(capability))
    try:
        yield
    finally:
        driver.set_active(before)


class _Driver:
    """Stands for a GPU; kernels of other capabilities are kept apart by the number of the device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 1000 + self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def kept(found: dict[str, Launch]) -> Iterator[None]:
    """Within, launches go to `found` by their name, and nothing runs."""
    from triton.runtime.jit import JITFunction

    def keep(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch = Launch(self, args, options)
        found.setdefault(launch.name, launch)

    with mock.patch.object(JITFunction, "run", keep):
        yield


@contextmanager
def choosing(choose: Callable[..., Tile]) -> Iterator[None]:
    """Within, products run with the tile that this gives, called as `Tuner.choose` is."""
    from tfmq.kernels.triton import launch as triton_launch

    tuner: Any = triton_launch.tuner
    tuner.choose = choose
    try:
        yield
    finally:
        del tuner.choose


def forced(tile: Tile) -> Any:
    """Within, every product runs with this tile."""
    return choosing(lambda *_: tile)


@contextmanager
def watched() -> Iterator[list[Tile]]:
    """The tiles that products within are given."""
    from tfmq.kernels.triton import launch as triton_launch

    choose, seen = triton_launch.tuner.choose, []

    def watching(*args: Any) -> Tile:
        seen.append(choose(*args))
        return seen[-1]

    with choosing(watching):
        yield seen
