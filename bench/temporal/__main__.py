"""Temporal features: how much of a model they are, what each way to keep them costs, what the cache saves.

`python dev.py bench temporal --json F` writes `share`, `error`, `cache` and `ranges` (docs/temporal.md explains them).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from devkit.inprocess import use_host
from tfmq import atomic

PARTS = ("share", "error", "cache", "ranges")


def run(
    parts: tuple[str, ...],
    checkpoint: Path | None = None,
    prompts: Path | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """The sections asked for, in the order of `PARTS`; each prints that it starts and how long it took. keep: is handed
    all that is there after each."""
    from bench.temporal.cache import cache
    from bench.temporal.error import error
    from bench.temporal.ranges import ranges
    from bench.temporal.share import share

    sections: dict[str, Callable[[], Any]] = {
        "share": share,
        "error": lambda: error(checkpoint, prompts),
        "cache": lambda: cache(checkpoint, prompts),
        "ranges": lambda: ranges(checkpoint, prompts),
    }
    found: dict[str, Any] = {}
    for part in parts:
        print(f"{part} ...", flush=True)
        start = time.perf_counter()
        found[part] = sections[part]()
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
        keep(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.temporal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="SD1.5 format; default: the demo's (for `error` and `ranges`)")
    parser.add_argument("--prompts", type=Path, help="one per line; default: the demo's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures there, section by section")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="only these; others stay as they are in the JSON"
    )
    arguments = parser.parse_args()
    use_host(arguments.device)
    parts = tuple(part for part in PARTS if part in arguments.parts)
    target = arguments.json
    known = json.loads(target.read_text(encoding="utf-8")) if target and target.is_file() and parts != PARTS else {}

    def keep(found: dict[str, Any]) -> None:
        if target:
            merged = known | found
            text = json.dumps({part: merged[part] for part in PARTS if part in merged}, indent=1)
            atomic.write_bytes(target, f"{text}\n".encode())

    print(json.dumps(run(parts, arguments.checkpoint, arguments.prompts, keep), indent=1))


if __name__ == "__main__":
    main()
