"""Every Triton kernel, compiled by every supported Triton for every compute capability. No GPU is needed.

Each Triton is installed into a folder of the cache, without what it depends on, beside the torch that is here, and
compiles in processes of its own (`bench.gpu.compile_kernels`). The folder is removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from devkit.paths import CACHE, ROOT

VERSIONS = "3.2.0", "3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1"  # the last release of each; pyproject's and ours
CAPABILITIES = 75, 80, 86, 89, 90, 120
# Triton -> the newest capability that it makes code for; 3.2.0 ends in "Internal Triton PTX codegen error" for 12.0.
NEWEST = {"3.2": 90}
FOLDER = CACHE / "compile_matrix"
PATIENCE = 600  # seconds for one version and capability
CHILD = "import sys; from bench.gpu.compile_kernels import main; main(int(sys.argv[1]))"


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py bench compile_matrix", description=__doc__)
    for name in ("--checkpoint", "--prompts", "--device"):
        parser.add_argument(name, help="not used")
    parser.add_argument("--versions", default=",".join(VERSIONS), help="of Triton, separated by commas")
    parser.add_argument("--capabilities", default=",".join(map(str, CAPABILITIES)), help="such as 86,89")
    parser.add_argument("--keep", action="store_true", help="leave the installed versions in the cache")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    cells = []
    print(f"{'triton':8}{'capability':>11}{'kernels':>9}{'seconds':>9}{'registers':>11}{'spilled':>9}{'failed':>8}")
    for version in arguments.versions.split(","):
        folder = FOLDER / f"triton-{version}"
        refused = install(version, folder)
        for capability in map(int, arguments.capabilities.split(",")):
            skipped = too_new(version, capability)
            if refused or skipped:
                cells.append(_cell(version, capability, [], skipped))
                cells[-1]["failed"] += [refused] if refused else []
            else:
                cells.append(compile_all(version, folder, capability))
            print(line(cells[-1]), flush=True)
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    bad = [cell for cell in cells if cell["failed"]]
    for cell in bad:
        for failure in cell["failed"]:
            print(f"{cell['triton']} for {cell['capability']}: {failure}")
    if arguments.json:
        found = {"torch": _torch(), "python": platform.python_version(), "cells": cells}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(bool(bad))


def install(version: str, folder: Path) -> str | None:
    """Triton alone into `folder`, unless it is there; why that failed, or None."""
    if (folder / f"triton-{version}.dist-info").is_dir():
        return None
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, f"triton=={version}"], capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        return f"cannot be installed ({said[-1]})"
    return None


def too_new(version: str, capability: int) -> str | None:
    """Why this Triton has no code for the capability, or None."""
    newest = NEWEST.get(".".join(version.split(".")[:2]))
    if newest is None or capability <= newest:
        return None
    return f"this Triton knows no capability over {newest / 10}"


def compile_all(version: str, folder: Path, capability: int) -> dict[str, Any]:
    """The cell of the table: what its process printed, and why it ended early if it did."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", CHILD, str(capability)]
    failed = None
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        out = done.stdout
        if done.returncode:
            failed = f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}"
    except subprocess.TimeoutExpired as error:
        out = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        failed = f"not done after {PATIENCE} seconds"
    rows = [json.loads(row) for row in out.splitlines() if row.startswith("{")]
    found = rows.pop(0)["triton"] if rows else version
    cell = _cell(version, capability, rows, None)
    if found != version:
        cell["failed"].append(f"this was Triton {found}")
    if failed or not rows:
        cell["failed"].append(failed or "nothing was compiled")
    return cell


def _cell(version: str, capability: int, rows: list[dict[str, Any]], skipped: str | None) -> dict[str, Any]:
    return {
        "triton": version,
        "capability": capability,
        "kernels": len(rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "most_registers": max((row.get("registers") or 0 for row in rows), default=0),
        "spilled": sum((row.get("spilled") or 0) > 0 for row in rows),
        "failed": [f"{row['case']}, {row['name']}: {row['failed']}" for row in rows if row["failed"]],
        **({"skipped": skipped} if skipped else {}),
    }


def line(cell: dict[str, Any]) -> str:
    start = f"{cell['triton']:8}{cell['capability'] / 10:>11.1f}"
    if "skipped" in cell:
        return f"{start}  {cell['skipped']}"
    return (
        f"{start}{cell['kernels']:>9}{cell['seconds']:>9.1f}{cell['most_registers']:>11}{cell['spilled']:>9}"
        f"{len(cell['failed']):>8}"
    )


def _torch() -> str:
    import torch

    return torch.__version__
