"""Every kernel in every dtype on odd shapes against float64, every shipped tile, and what only a GPU has: streams,
graphs, addresses that are off, tensors of more than 2^31 bytes. On a CPU: the same in the interpreter at toy sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.gpu.case import Absent, Case, Job

try:
    import triton  # noqa: F401
except ImportError:
    raise Absent("Triton is not installed") from None

from bench.gpu import checks, device_checks, interpreted
from bench.gpu.checks import PLAIN, TOY
from bench.gpu.layers import DTYPES, Place
from tfmq.kernels.triton import tune as triton_tune
from tfmq.kernels.triton.tune import Tile

# On Hopper a program of 4 warps and 64 rows multiplies with wgmma, one of 32 rows or of 2 warps with mma.sync, which is
# what GPUs for consumers have.
SYNC = Tile(32, 64, 64, 1, 4, 4)
SYNC_TILES = (
    SYNC, Tile(32, 128, 64, 1, 4, 3), Tile(32, 64, 128, 1, 4, 3), Tile(64, 64, 64, 1, 2, 4), Tile(64, 128, 64, 1, 2, 3),
)  # fmt: skip


def cases(job: Job) -> list[Case]:
    if job.device == "cpu":
        interpreted.install()
        return [Case(name, partial(_judged, case, torch.device("cpu")), 30.0) for name, case in toys().items()]
    device = torch.device("cuda")
    capability = torch.cuda.get_device_capability(device)
    found = [Case(name, partial(_judged, case, device)) for name, case in kernels(capability).items()]
    return found + [Case(name, partial(_judged, case, device), 30.0) for name, case in device_checks.ALL.items()]


Parity = Callable[..., None]  # takes `place`


def _judged(case: Parity, device: torch.device) -> dict[str, Any]:
    place = Place(device)
    try:
        case(place=place)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"worst": place.judge.worst}


def kernels(capability: tuple[int, int]) -> dict[str, Parity]:
    """Those that need nothing of a GPU but that it computes; the stage `compile` makes their variants."""
    found: dict[str, Parity] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        # Whatever Triton compiles anew takes a second of a core: one dtype gets all shapes, the others half of them.
        whole = dtype == torch.float16
        found[f"codes {name}"] = partial(checks.codes, dtype, None if whole else 3)
        found[f"rows {name}"] = partial(checks.rows, dtype)
        found[f"norms {name}"] = partial(checks.norms, dtype, None if whole else 3)
        for tile, kind in ((PLAIN, ""), (SYNC, " mma.sync")):
            some = None if whole and tile == PLAIN else 3
            found[f"linear {name}{kind}"] = partial(checks.linears, dtype, tile, some)
            found[f"conv {name}{kind}"] = partial(checks.convolutions, dtype, tile, some)
            found[f"int4 {name}{kind}"] = partial(
                checks.four_bits, dtype, tile, (16, 32, 64, 128) if some is None else (32, 128)
            )
    found["views"], found["layouts"] = checks.views, checks.layouts
    for tile in triton_tune.tiles_of(capability):
        found[f"tile {_text(tile)}"] = partial(checks.one_tile, tile)
    for tile in SYNC_TILES:
        found.setdefault(f"mma.sync tile {_text(tile)}", partial(checks.one_tile, tile))
    return found


def toys() -> dict[str, Parity]:
    """The same code in the interpreter, as far as some seconds reach."""
    half, single = torch.float16, torch.float32
    return {
        "codes float16": partial(checks.codes, half, 1), "rows bfloat16": partial(checks.rows, torch.bfloat16, (1, 70)),
        "norms float32": partial(checks.norms, single, 1), "linear float16": partial(checks.linears, half, TOY, 1),
        "conv bfloat16": partial(checks.convolutions, torch.bfloat16, TOY, 2),
        "int4 float32": partial(checks.four_bits, single, TOY, (32,)),
        f"tile {_text(TOY)}": partial(checks.one_tile, TOY, 4), "views": checks.views, "layouts": checks.layouts,
    }  # fmt: skip


def _text(tile: Tile) -> str:
    return "x".join(map(str, tile[:3])) + f" warps {tile.warps} stages {tile.stages}"
