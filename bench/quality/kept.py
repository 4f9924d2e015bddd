"""What the entries of `bench.quality`, and the pieces of a run, need not make twice."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CALIBRATIONS = "tfmq_calibrations"  # the host's name for the folder


class Kept:
    """A folder for one run, named by what its figures depend on; it goes with the process where none is given.

    files: the pack's module that reads and writes calibrations.
    """

    def __init__(self, folder: Path | None, files: ModuleType, about: dict[str, Any]) -> None:
        self.files = files
        self._own = tempfile.TemporaryDirectory() if folder is None else None
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(self._own.name if self._own else folder or "") / digest
        self.folder.mkdir(parents=True, exist_ok=True)

    def pictures(self, variant: str) -> Tensor | None:
        """Those of float32, if they were made."""
        file = self.folder / f"{variant}.pt"
        return torch.load(file) if file.is_file() else None

    def keep_pictures(self, variant: str, pictures: Tensor) -> None:
        torch.save(pictures, self.folder / f"{variant}.pt")

    def calibration(self, variant: str, find: Callable[[], Any]) -> tuple[Any, float]:
        """The calibration, and the seconds that it took when it was made."""
        file = self.folder / f"{variant}.calibration.safetensors"
        clock = file.with_suffix(".json")
        if not file.is_file() or not clock.is_file():
            started = time.perf_counter()
            calibration = find()
            clock.write_text(json.dumps({"seconds": time.perf_counter() - started}))
            self.files.write_calibration(file, calibration)
        return self.files.read_calibration(file), json.loads(clock.read_text())["seconds"]

    def place(self, variant: str, entry: str, anew: bool) -> Path:
        """Where what is found on the way to an entry goes; emptied where it is to be timed."""
        folder = self.folder / "on the way" / variant / entry
        if anew:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@contextmanager
def calibrations_in(folder: Path) -> Iterator[None]:
    """Within, nothing goes to the person's own calibrations, nor is anything found there."""
    import folder_paths

    known = folder_paths.folder_names_and_paths[CALIBRATIONS]
    folder_paths.folder_names_and_paths[CALIBRATIONS] = ([str(folder)], known[1])
    try:
        yield
    finally:
        folder_paths.folder_names_and_paths[CALIBRATIONS] = known
