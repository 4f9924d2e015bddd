"""Faults for bench/gpu_check.py, named by TFMQ_GPU_CHECK_PLANT: see tests/unit/test_gpu_check.py."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any


def plant(stage: str) -> None:
    if stage == "env":
        from bench.gpu.stages import env

        def breaks() -> dict[str, Any]:
            raise RuntimeError("planted: an illegal memory access was encountered")

        env._versions = breaks
        sys.modules["__main__"]._answers = lambda device: False  # type: ignore[attr-defined]
        env._compiler = lambda: os.kill(os.getpid(), signal.SIGSEGV)
    elif stage == "compile":
        from bench.gpu import launches

        compile_ = launches.Launch.compile

        def dies(self: Any, capability: int | None) -> Any:
            if capability == 90 and self.name.startswith("quantize"):
                os.kill(os.getpid(), signal.SIGKILL)
            return compile_(self, capability)

        launches.Launch.compile = dies
    elif stage == "parity":
        _parity()


def _parity() -> None:
    import torch

    from tfmq.kernels.triton import backend as triton_backend
    from tfmq.kernels.triton import launch as triton_launch

    def raises(*_: Any) -> Any:
        raise ValueError("planted: no such block")

    norm = triton_launch.group_norm

    def hangs(x: Any, *rest: Any) -> Any:
        if x.dtype == torch.float32:  # of one case
            time.sleep(600)
        return norm(x, *rest)

    triton_launch.quantize_rows = raises
    triton_launch.group_norm = hangs
    convolve = triton_backend.conv2d_static

    def off_by_one_sum(x: Any, weight: Any, *rest: Any) -> Any:
        y = convolve(x, weight, *rest)
        if x.shape[1] == 128:  # of one case
            y[0, 0, 0, 0] += weight.scale[0]
        return y

    triton_backend.conv2d_static = off_by_one_sum
