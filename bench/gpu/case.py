"""What a stage of bench/gpu_check.py is made of, and the lines that it leaves. Standard library only."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, WRONG, FAILED, SKIPPED, CRASHED, HUNG = "ok", "wrong", "failed", "skipped", "crashed", "hung"
BAD = (WRONG, FAILED, CRASHED, HUNG)
RESTART = 86  # exit code of a process whose device answers no more: the next case needs a new process


class Wrong(Exception):
    """A result is not what it has to be."""


class Absent(Exception):
    """What a case (or, from `cases`, a whole stage) needs is not here; the text says what."""


@dataclass(frozen=True)
class Case:
    """run: returns what was found, as JSON has it. limit: seconds after which it counts as hung."""

    name: str
    run: Callable[[], dict[str, Any] | None]
    limit: float = 20.0


@dataclass(frozen=True)
class Job:
    """One process's share of a stage. done: names of cases that need not run again. seconds: that are left.

    out: folder of the results; work: a folder for this run alone, which goes with it. host: a ComfyUI, or None.
    """

    stage: str
    device: str
    out: str
    work: str
    seconds: float
    host: str | None = None
    checkpoint: str | None = None
    case_limit: float | None = None
    done: list[str] = field(default_factory=list)


def results_file(out: Path | str) -> Path:
    return Path(out) / "results.jsonl"


def append(file: Path, **record: Any) -> None:
    """Add a line, in one write, so that several processes may."""
    with file.open("ab") as stream:
        stream.write(f"{json.dumps(record, default=str)}\n".encode())


def parse(text: bytes) -> Iterator[dict[str, Any]]:
    """The lines that are whole; a process may have died in the middle of one."""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def ended(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"its process ended with code {code}"
    try:
        return f"its process was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"its process was killed by signal {-code}"
