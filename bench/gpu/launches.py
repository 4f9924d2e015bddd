"""What our launch code launches: kept instead, compiled, or run with a tile of one's choice. Needs Triton."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu.cross import compile_for, instruction, usage
from tfmq.kernels.triton import launch as triton_launch
from tfmq.kernels.triton.tune import Tile

TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


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
            kind, fixed, aligned = _argument(parameter, argument)
            if parameter.name in ("x", "out", "bias") or fixed is not None:
                given.append(f"{parameter.name}={fixed if kind == 'constexpr' else kind}")
            if not aligned and kind != "constexpr" and _may_be_aligned(parameter):
                given.append(f"{parameter.name} odd")
            elif argument is None and parameter.name in ("inverse", "gain", "partial", "factor"):
                given.append(f"no {parameter.name}")
        return f"{self.kernel.__name__.removesuffix('_kernel')} {' '.join([*short, *more, *given])}"

    def compile(self, capability: int | None) -> dict[str, Any]:
        """For the GPU of this process (None), so that its launches find it done, or for another."""
        started = time.perf_counter()
        if capability is None:
            built = self.kernel.warmup(*self.args, grid=(1, 1, 1), **self.options)
        else:
            built = self._cross(capability)
        found: dict[str, Any] = {"compile_s": round(time.perf_counter() - started, 3)}
        found |= {"shared": getattr(built.metadata, "shared", None), "instruction": instruction(built)}
        if capability is None:
            prepare = getattr(built, "_init_handles", None)
            if prepare is not None:
                prepare()  # loads it; raises where it does not fit the GPU
            registers, spills = getattr(built, "n_regs", None), getattr(built, "n_spills", None)
        else:
            try:
                registers, spills, _ = usage(built)
            except Exception as error:  # its tool is not there, or says something else in this version
                return {**found, "registers": None, "usage_error": str(error)[:200]}
        return {**found, "registers": registers, "spills": spills}

    def _cross(self, capability: int) -> Any:
        kernel = self.kernel
        signature, constants, aligned = {}, {}, []
        options = {n: v for n, v in self.options.items() if n not in kernel.arg_names}
        for parameter, argument in zip(kernel.params, self.args, strict=False):
            kind, fixed, divides = _argument(parameter, argument)
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[parameter.name] = fixed
            elif divides:
                aligned.append(parameter.name)
        for name, value in self.options.items():
            if name in kernel.arg_names:
                signature[name], constants[name] = "constexpr", value
        ordered = {name: signature[name] for name in kernel.arg_names}
        return compile_for(kernel, capability, ordered, constants, aligned, options)


def _may_be_aligned(parameter: Any) -> bool:
    return not parameter.do_not_specialize and not getattr(parameter, "do_not_specialize_on_alignment", False)


def _argument(parameter: Any, argument: Any) -> tuple[str, Any, bool]:
    """Type of an argument as Triton's launcher finds it; its value if that is compiled in; whether it divides by 16."""
    if argument is None:
        return "constexpr", None, False
    if isinstance(argument, torch.Tensor):
        return TYPES[argument.dtype], None, argument.data_ptr() % 16 == 0
    if isinstance(argument, float):
        return "fp32", None, False
    may = _may_be_aligned(parameter)
    if argument == 1 and not parameter.do_not_specialize:
        return "constexpr", 1, False
    return "i32" if -(2**31) <= argument < 2**31 else "i64", None, may and argument % 16 == 0


class _Kept:
    """Stands in a kernel's place."""

    def __init__(self, kernel: Any, keep: Callable[[Launch], None]) -> None:
        self.kernel, self.keep = kernel, keep

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: self.keep(Launch(self.kernel, args, options))


@contextmanager
def kept(found: dict[str, Launch]) -> Iterator[None]:
    """Within, launches go to `found` by their name, and nothing runs."""

    def keep(launch: Launch) -> None:
        found.setdefault(launch.name, launch)

    replaced = []
    for module in [m for name, m in list(sys.modules.items()) if name.startswith("tfmq.kernels.triton_")]:
        for name, value in list(vars(module).items()):
            # What kernels call keeps its place: only what is launched is called so.
            if name.endswith("_kernel") and hasattr(value, "arg_names"):
                replaced.append((module, name, value))
                setattr(module, name, _Kept(value, keep))
    try:
        yield
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


@contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Within, every product runs with this tile."""
    tuner: Any = triton_launch.tuner
    tuner.choose = lambda *_, **__: tile
    try:
        yield
    finally:
        del tuner.choose


@contextmanager
def watched() -> Iterator[list[Tile]]:
    """The tiles that products within are given."""
    tuner: Any = triton_launch.tuner
    choose, seen = tuner.choose, []

    def watching(*args: Any, **named: Any) -> Tile:
        seen.append(choose(*args, **named))
        return seen[-1]

    tuner.choose = watching
    try:
        yield seen
    finally:
        del tuner.choose
