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
from tfmq.report import atomic

PARTS = ("share", "error", "cache", "ranges")


def run(parts: tuple[str, ...], checkpoint: Path | None = None, prompts: Path | None = None) -> dict[str, Any]:
    """The sections asked for, in the order of `PARTS`; each prints that it starts and how long it took."""
    from bench.temporal_cache import cache
    from bench.temporal_error import error
    from bench.temporal_ranges import ranges
    from bench.temporal_share import share

    sections: dict[str, Callable[[], Any]] = {
        "share": share,
        "error": lambda: error(checkpoint, prompts),
        "cache": cache,
        "ranges": lambda: ranges(checkpoint, prompts),
    }
    found: dict[str, Any] = {}
    for part in parts:
        print(f"{part} ...", flush=True)
        start = time.perf_counter()
        found[part] = sections[part]()
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="SD1.5 format; default: the demo's (for `error` and `ranges`)")
    parser.add_argument("--prompts", type=Path, help="one per line; default: the demo's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    use_host(arguments.device)
    parts = tuple(part for part in PARTS if part in arguments.parts)
    text = json.dumps(run(parts, arguments.checkpoint, arguments.prompts), indent=1)
    if arguments.json:
        atomic.write_bytes(arguments.json, f"{text}\n".encode())
    print(text)


if __name__ == "__main__":
    main()
