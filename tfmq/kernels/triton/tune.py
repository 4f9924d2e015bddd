"""Which tile a product runs with: candidates by reason, timed once per shape on a GPU, kept on disk.

`tiles.json` ships the candidates per compute capability. An estimate orders them for a shape; the first runs
where nothing may be timed (a CUDA graph is being captured, or there is no GPU).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

FORMAT = 2  # of the file; raised when the kernels change so that old times mean nothing
TRIED = 6  # candidates timed per shape
ROUNDS = 3  # of timing them all
SPLITS = (1, 2, 4, 8)
SHIPPED = Path(__file__).with_name("tiles.json")


class Tile(NamedTuple):
    """m, n, k: of the block of the product that a program works on at a time; split: programs that share the columns
    of one block; warps, stages: of a program."""

    m: int
    n: int
    k: int
    split: int
    warps: int
    stages: int


class Shape(NamedTuple):
    """A product [m, c * taps] x [n, c * taps]. kind: what else tells kernels apart, such as "conv int4 float16"."""

    kind: str
    m: int
    n: int
    c: int
    taps: int


class Machine(NamedTuple):
    """The GPU: its name, compute capability and number of multiprocessors."""

    name: str
    capability: tuple[int, int]
    processors: int


@lru_cache
def machine(device: torch.device) -> Machine:
    """The machine of a CUDA device; for any other an invented small one (Triton's interpreter)."""
    if device.type != "cuda":
        return Machine(device.type, (8, 0), 4)
    found = torch.cuda.get_device_properties(device)
    return Machine(found.name, (found.major, found.minor), found.multi_processor_count)


@lru_cache
def _families() -> dict[int, list[list[int]]]:
    families = json.loads(SHIPPED.read_text(encoding="utf-8"))["tiles"]
    return {int(capability): tiles for capability, tiles in families.items()}


def tiles_of(capability: tuple[int, int]) -> list[Tile]:
    """The shipped tiles of the newest family that is not newer than the GPU, none of them split."""
    families = _families()
    wanted = capability[0] * 10 + capability[1]
    m_n_k_warps_stages = families[max([c for c in families if c <= wanted], default=min(families))]
    return [Tile(m, n, k, 1, warps, stages) for m, n, k, warps, stages in m_n_k_warps_stages]


def candidates(shape: Shape, at: Machine) -> list[Tile]:
    """Shipped tiles, split in all the ways that make sense, quickest first by `estimate`."""
    found = []
    for tile in tiles_of(at.capability):
        steps = shape.taps * -(-shape.c // tile.k)
        # Under 8 steps the pipeline of loads never fills.
        found += [tile._replace(split=s) for s in SPLITS if s == 1 or steps >= 8 * s]
    return sorted(found, key=lambda tile: estimate(shape, tile, at))


def estimate(shape: Shape, tile: Tile, at: Machine) -> float:
    """A time without a unit, to order tiles by: rounds of programs over the GPU, each with its steps over the columns,
    each step with its multiplications and its loads; a split writes its shares out and reads them back."""
    programs = -(-shape.m // tile.m) * -(-shape.n // tile.n) * tile.split
    rounds = -(-programs // at.processors)
    steps = -(-shape.taps * -(-shape.c // tile.k) // tile.split)
    # A byte from the L2 cache takes about as long as 48 multiplications; 12 steps to start and to end a program.
    step = max(tile.m * tile.n * tile.k, 48 * (tile.m + tile.n) * tile.k)
    shares = 0 if tile.split == 1 else 8 * (2 * tile.split + 1) * shape.m * shape.n * 48 / at.processors
    return rounds * (steps + 12) * step + shares


def capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing may be timed then, nor anything synchronized."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_untimed: ContextVar[bool] = ContextVar("tfmq_untimed", default=False)


@contextmanager
def untimed() -> Iterator[None]:
    """Inside, and in this thread alone, nothing is timed: a shape that nothing is known of takes the estimate."""
    token = _untimed.set(True)
    try:
        yield
    finally:
        _untimed.reset(token)


Watcher = Callable[["Shape", int, int], None]
_watcher: ContextVar[Watcher | None] = ContextVar("tfmq_watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside, and in this thread alone, `watcher` is told of every product that this process meets for the first time:
    its shape, and how many of how many tiles are compiled. What it raises ends the call that meets it."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def tell(shape: Shape, done: int, total: int) -> None:
    """Tell whoever watches."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(shape, done, total)


class Tuner:
    """Remembers the tile of every shape, in memory and in a file. path: of the file; None keeps nothing on disk.
    software: what compiles the kernels, in words; the file keeps times of each apart.
    """

    def __init__(self, path: Path | None, software: str = "") -> None:
        self.path = path
        self.software = software
        self._known: dict[tuple[Shape, Machine], Tile] = {}
        self._on_disk: dict[str, list[int]] | None = None

    def choose(self, shape: Shape, at: Machine, time: Callable[[Tile], float] | None) -> Tile:
        """The tile for a shape. time: runs a tile and says how long it took; None where nothing can be timed."""
        known = self._known.get((shape, at))
        if known is not None:
            return known
        ordered = candidates(shape, at)
        kept = self._disk().get(self._key(shape, at))
        if kept is not None and tuple(kept) in {tuple(tile) for tile in ordered}:
            tile = Tile(*kept)
            tell(shape, 0, 1)  # it may have to be compiled
            if time is not None and not _untimed.get() and not capturing() and quickest([tile], time, 1) is None:
                # Another driver or assembler than the one that it was timed with.
                tile = _first_that_runs([one for one in ordered if one != tile], time) or ordered[0]
        elif time is None or _untimed.get() or capturing():
            return ordered[0]  # not remembered: a later call may be free to time
        else:
            worth = _worth_timing(ordered)
            tell(shape, 0, len(worth))
            best = quickest(worth, time, told=lambda done: tell(shape, done, len(worth))) or _first_that_runs(
                [tile for tile in ordered if tile not in worth], time
            )
            tell(shape, len(worth), len(worth))
            if best is None:  # remembered, so that not every call tries all of them again; not kept on disk
                logging.warning("TFMQ: no tile could be timed for %s on %s", shape, at.name)
            else:
                self._keep(self._key(shape, at), best)
            tile = best or ordered[0]
        self._known[shape, at] = tile
        return tile

    def forget(self) -> None:
        """Read the file anew at the next call."""
        self._known.clear()
        self._on_disk = None

    def _key(self, shape: Shape, at: Machine) -> str:
        return f"{at.name} | {self.software} | {shape.kind} | {shape.m} x {shape.n} x {shape.taps} * {shape.c}"

    def _disk(self) -> dict[str, list[int]]:
        if self._on_disk is None:
            self._on_disk = read(self.path)
        return self._on_disk

    def _keep(self, key: str, tile: Tile) -> None:
        if self.path is None:
            return
        merged = {**read(self.path), key: list(tile)}  # another process may have written meanwhile
        self._on_disk = merged
        try:
            write(self.path, merged)
        except OSError as error:
            logging.debug("TFMQ: kernel times are not kept in %s: %s", self.path, error)


def quickest(
    tiles: Iterable[Tile],
    time: Callable[[Tile], float],
    rounds: int = ROUNDS,
    told: Callable[[int], None] | None = None,
) -> Tile | None:
    """The tile with the least median time; one that does not compile, does not fit or runs out of memory is left out.
    None where no tile runs. In every round each has a turn, so that a clock that slows down meets all alike.

    told: called in the first round, in which they are compiled, with how many are; what it raises ends this.
    """
    times: dict[Tile, list[float]] = {tile: [] for tile in tiles}
    for turn in range(rounds):
        for compiled, tile in enumerate(list(times)):
            if told is not None and turn == 0 and compiled:
                told(compiled)
            try:
                times[tile].append(time(tile))
            except Exception as error:  # Triton's errors for what does not fit have no base class of their own
                logging.debug("TFMQ: %s cannot be timed: %s", tile, error)
                del times[tile]
    return min(times, key=lambda tile: median(times[tile]), default=None)


def _first_that_runs(tiles: list[Tile], time: Callable[[Tile], float]) -> Tile | None:
    return next((tile for tile in tiles if quickest([tile], time, 1) is not None), None)


def _worth_timing(ordered: list[Tile]) -> list[Tile]:
    """The first few, of every block at most two splits."""
    seen: dict[Tile, int] = {}
    out = []
    for tile in ordered:
        block = tile._replace(split=1)
        seen[block] = seen.get(block, 0) + 1
        if seen[block] <= 2:
            out.append(tile)
    return out[:TRIED]


def read(path: Path | None) -> dict[str, list[int]]:
    """The kept tiles; nothing of a file that is missing, damaged or of another format."""
    if path is None:
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["format"] != FORMAT:
            return {}
        return {str(key): [int(value) for value in tile] for key, tile in kept["tiles"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write(path: Path, tiles: dict[str, list[int]]) -> None:
    """Write the file whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "tiles": tiles}, file, indent=0)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cache_file() -> Path:
    """`kernels.json` in the user's cache folder."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tfmq" / "kernels.json"
