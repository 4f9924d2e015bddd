"""A process of bench/gpu_check.py: waits for a job on its standard input, then runs the cases of one stage.

It imports torch while the stage before it runs. It ends when its standard input does, so that it is never left behind.
TFMQ_GPU_CHECK_PLANT names a module that is imported before the cases are made, for tests that plant faults: its
`plant(stage)` may replace whatever it likes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu.case import FAILED, OK, RESTART, SKIPPED, WRONG, Absent, Case, Job, Wrong, append, ended, results_file

PLANT = "TFMQ_GPU_CHECK_PLANT"
MODULES = {"compile": "compiling", "sd15": "networks", "sdxl": "networks", "comfy": "in_comfy"}


def main() -> None:
    faulthandler.enable()
    import torch  # noqa: F401

    line = sys.stdin.readline()
    if not line:
        return
    threading.Thread(target=_end_with_owner, daemon=True).start()
    job = Job(**json.loads(line))
    print(f"--- {job.stage}", flush=True)
    code = 1
    try:
        code = work(job)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to take down a device that does not answer could take for ever


def work(job: Job) -> int:
    """Run the cases; returns the exit code."""
    file = results_file(job.out)

    def tell(event: str, **more: Any) -> None:
        append(file, stage=job.stage, event=event, at=round(time.time(), 3), **more)

    if job.stage == "parity" and job.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    try:
        plant = os.environ.get(PLANT)
        if plant:
            importlib.import_module(plant).plant(job.stage)
        # `env` tells what there is in any case; `compile` forks, and so may not touch the device.
        if job.device == "cuda" and job.stage not in ("env", "compile"):
            _require_gpu()
        module = importlib.import_module(f"bench.gpu.stages.{MODULES.get(job.stage, job.stage)}")
        cases: list[Case] = module.cases(job)
    except Absent as reason:
        tell("absent", reason=str(reason))
        return 0
    tell("cases", names=[case.name for case in cases])
    left = [case for case in cases if case.name not in set(job.done)]
    limit = job.case_limit
    if limit is not None:
        left = [Case(case.name, case.run, limit) for case in left]
    parallel = getattr(module, "parallel", None)
    if parallel is not None:
        parallel(left, tell, job)
    else:
        for case in left:
            tell("start", case=case.name, limit=case.limit)
            if not attempt(case, tell, job.device):
                return RESTART
    tell("end")
    return 0


def attempt(case: Case, tell: Callable[..., None], device: str) -> bool:
    """Run a case and tell how it went. False where the device answers no more."""
    import torch

    started = time.perf_counter()
    status = OK
    more: dict[str, Any] = {}
    try:
        with torch.inference_mode():
            more["data"] = case.run() or {}
        if device == "cuda" and torch.cuda.is_initialized():  # an error of a kernel belongs to its case
            torch.cuda.synchronize()
    except Absent as reason:
        status, more = SKIPPED, {"error": str(reason)}
    except Exception as error:  # whatever it is: the others go on
        traceback.print_exc()
        status = WRONG if isinstance(error, Wrong) else FAILED
        text = " ".join(str(error).split())
        more = {"error": (text if status == WRONG else f"{type(error).__name__}: {text}")[:500]}
    alive = status in (OK, SKIPPED) or _answers(device)
    tell(status, case=case.name, seconds=round(time.perf_counter() - started, 3), **more)
    return alive


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU here: --device cpu checks what a CPU can")


def _answers(device: str) -> bool:
    """Whether the device still computes; after some CUDA errors it does not in this process."""
    import torch

    if device != "cuda" or not torch.cuda.is_initialized():
        return True
    with contextlib.suppress(Exception):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return float(torch.ones(2, device="cuda").sum()) == 2
    return False


def spread(cases: list[Case], tell: Callable[..., None], job: Job) -> None:
    """Run cases in forked processes, one per core; a process that dies or hangs loses its case alone.

    Before it nothing may have used the device in this process.
    """
    import mmap

    slots = max(1, min(os.cpu_count() or 1, 16, len(cases)))
    place = Path(job.work)
    waiting = {slot: cases[slot::slots] for slot in range(slots)}
    shared = {slot: mmap.mmap(-1, 8) for slot in range(slots)}  # how many of its cases a slot has begun
    running: dict[int, int] = {}  # process -> slot
    began: dict[int, tuple[int, float]] = {}

    def fork(slot: int) -> None:
        shared[slot][:] = (0).to_bytes(8, "little")
        began[slot] = 0, time.monotonic()
        child = os.fork()
        if child:
            running[child] = slot
            return
        code = 1
        try:
            os.chdir(place)
            for number, case in enumerate(waiting[slot], 1):
                if os.getppid() == 1:
                    break  # whoever would read it is gone
                shared[slot][:] = number.to_bytes(8, "little")
                attempt(case, tell, "cpu")
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    for slot in range(slots):
        fork(slot)
    while running:
        time.sleep(0.02)
        for child, slot in list(running.items()):
            number = int.from_bytes(shared[slot][:], "little")
            if number != began[slot][0]:
                began[slot] = number, time.monotonic()
            current = waiting[slot][number - 1] if number else None
            gone, status = os.waitpid(child, os.WNOHANG)
            hung = not gone and current is not None and time.monotonic() - began[slot][1] > current.limit
            if hung:
                os.kill(child, signal.SIGKILL)
                gone, status = os.waitpid(child, 0)
            if not gone:
                continue
            del running[child]
            if status == 0:
                continue
            if current is not None:
                why = f"no end after {current.limit:g} s" if hung else ended(os.waitstatus_to_exitcode(status))
                tell("hung" if hung else "crashed", case=current.name, error=why)
            waiting[slot] = waiting[slot][max(number, 1) :]
            if waiting[slot]:
                fork(slot)


def _end_with_owner() -> None:
    while sys.stdin.readline():
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
