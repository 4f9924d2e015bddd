"""As if Triton were not installed, for bench/gpu_check.py."""

import sys


def plant(stage: str) -> None:
    sys.modules["triton"] = None  # type: ignore[assignment]
