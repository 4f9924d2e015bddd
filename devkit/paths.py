"""Where things lie. Standard library only: it runs before anything is installed."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
VENV = ROOT / ".venv"
HOST_CACHE = CACHE / "comfyui"
STANDINS = Path(__file__).resolve().parent / "standins"
WORKFLOWS = ROOT / "example_workflows"
PACK_NAME = "ComfyUI-TFMQ"


def venv_python() -> Path:
    """The interpreter of the pack's own virtual environment (it may not exist yet)."""
    return VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def host_dir() -> Path:
    """The ComfyUI source folder: COMFYUI_PATH where set, else the pinned copy in the cache."""
    given = os.environ.get("COMFYUI_PATH")
    return Path(given).expanduser().resolve() if given else HOST_CACHE / "src"
