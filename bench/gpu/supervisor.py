"""Runs the stages of bench/gpu_check.py, each in a process of its own. Standard library only.

A process that dies or hangs is replaced by another, which goes on behind the case that it was at. While a stage runs,
the process of the next one is already importing torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu import plan
from bench.gpu.case import CRASHED, FAILED, HUNG, OK, RESTART, SKIPPED, WRONG, Job, append, ended, parse, results_file
from bench.gpu.plan import Stage

ROOT = Path(__file__).resolve().parent.parent.parent
START_LIMIT = 90.0  # seconds until a process names its cases: torch from a slow disk takes a minute
SUMMARY_SECONDS = 2.0
LOG_BYTES = 4 << 20
FINISHED = (OK, WRONG, FAILED, SKIPPED, CRASHED, HUNG)


@dataclass
class Watched:
    """What the lines of a stage say so far."""

    names: list[str] | None = None
    finished: set[str] = field(default_factory=set)
    flying: dict[str, tuple[float, float]] = field(default_factory=dict)  # case -> when it began, its limit
    ended: bool = False
    absent: str | None = None

    def take(self, record: dict[str, Any], now: float) -> None:
        event, case = record["event"], record.get("case", "")
        if event == "cases":
            self.names = record["names"]
        elif event == "start":
            self.flying[case] = now, float(record.get("limit", 60.0))
        elif event in FINISHED:
            self.flying.pop(case, None)
            self.finished.add(case)
        elif event == "end":
            self.ended = True
        elif event == "absent":
            self.absent = record["reason"]

    @property
    def remaining(self) -> list[str]:
        return [name for name in self.names or [] if name not in self.finished]


class Process:
    """A worker, from its birth on. `send` gives it its job."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.gpu.worker"], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
                stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip

    def send(self, job: Job) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{json.dumps(asdict(job))}\n".encode())
            self.process.stdin.flush()
        except OSError:
            pass  # it died: to be seen by its exit code

    def end(self) -> None:
        """Kill it and what it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (OSError, AttributeError):  # gone; or a system without groups of processes
            self.process.kill()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            pass  # a driver holds it; nothing more can be done from here
        if self.process.stdin is not None:
            try:
                self.process.stdin.close()
            except OSError:
                pass


class Supervisor:
    def __init__(
        self, stages: list[Stage], budget: float, out: Path, device: str, host: str | None, checkpoint: str | None,
        case_limit: float | None,
    ) -> None:  # fmt: skip
        self.stages, self.budget, self.out, self.device = stages, budget, out, device
        self.host, self.checkpoint, self.case_limit = host, checkpoint, case_limit
        self.file, self.log = results_file(out), out / "log.txt"
        self.spare: Process | None = None
        self.current: Process | None = None

    def run(self) -> None:
        """All stages. What is found lies in the results file whatever happens to this process."""
        self.deadline = time.monotonic() + self.budget - SUMMARY_SECONDS
        self._note(budget=self.budget, device=self.device, stages=[stage.name for stage in self.stages])
        with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as work:
            self.work = work
            caches = {"TRITON_CACHE_DIR": f"{work}/triton", "XDG_CACHE_HOME": f"{work}/cache"}
            caches["TORCHINDUCTOR_CACHE_DIR"] = f"{work}/inductor"
            # Lines of another process's standard output are not to wait for it to end.
            self.environment = {**os.environ, **caches, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
            # To ask whether there is a GPU may not take hold of it: the stage `compile` forks.
            self.environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
            if self.host:
                self.environment["COMFYUI_PATH"] = self.host
            try:
                for index in range(len(self.stages)):
                    self._stage(index)
            finally:
                for process in (self.current, self.spare):
                    if process is not None:
                        process.end()

    def _stage(self, index: int) -> None:
        stage = self.stages[index]
        started = time.monotonic()
        left = self.deadline - started
        print(f"{stage.name}: {stage.about} ...", flush=True)
        reason = self._refused(stage)
        if reason is not None:
            return self._say(stage, "absent", reason, started)
        behind = [later for later in self.stages[index + 1 :] if self._refused(later) is None]
        allowed = plan.share(stage, behind, left)
        if allowed < plan.LEAST:
            return self._say(stage, "cut", f"{max(0.0, left):.0f} s were left for it", started)
        seen = Watched()
        end = started + allowed
        while True:
            outcome, why = self._process(stage, bool(behind), seen, end)
            if outcome == "restart" and seen.remaining:
                continue
            break
        not_run = seen.remaining
        if seen.absent is not None:
            self._say(stage, "absent", seen.absent, started)
        elif outcome == "time":
            at = ", ".join(seen.flying)
            self._say(stage, "cut", f"after {allowed:.0f} s" + (f", in {at}" if at else ""), started, not_run)
        elif outcome == "broken":
            self._say(stage, "broken", why, started, not_run)
        else:
            self._say(stage, "ran", "", started)

    def _refused(self, stage: Stage) -> str | None:
        if self.device == "cpu" and not stage.on_cpu:
            return "needs a GPU"
        return "no ComfyUI was given (--host)" if stage.name == "comfy" and not self.host else None

    def _process(self, stage: Stage, more: bool, seen: Watched, end: float) -> tuple[str, str]:
        """One process of a stage, to its end. Returns what is to be done: "done", "restart", "time", "broken"; why."""
        process = self.current = self.spare or Process(self.log, self.environment)
        self.spare = None
        if more:  # else only a fault would need it
            self.spare = Process(self.log, self.environment)
        before = len(seen.finished)
        offset = self.file.stat().st_size
        job = Job(
            stage.name, self.device, str(self.out), self.work, end - time.monotonic(), self.host, self.checkpoint,
            self.case_limit, sorted(seen.finished),
        )  # fmt: skip
        seen.flying.clear()
        named = seen.names is not None
        seen.names = seen.names or None
        process.send(job)
        born = time.monotonic()
        try:
            while True:
                code = process.process.poll()
                now = time.monotonic()
                offset = self._read(stage, seen, offset, now)
                if seen.ended or seen.absent is not None:
                    return "done", ""
                if code is not None:
                    return self._died(stage, seen, code, before)
                if now > end:
                    return "time", ""
                hung = [case for case, (since, limit) in seen.flying.items() if now - since > limit]
                if hung:
                    for case in hung:
                        limit = seen.flying.pop(case)[1]
                        self._case(stage, seen, HUNG, case, f"no end after {limit:g} s")
                    return "restart", ""
                if seen.names is None and not named and now - born > START_LIMIT:
                    return "broken", f"its process named no case within {START_LIMIT:g} s"
                time.sleep(0.05)
        finally:
            process.end()
            self.current = None

    def _read(self, stage: Stage, seen: Watched, offset: int, now: float) -> int:
        """Take the new lines; returns where the last whole one ends."""
        with self.file.open("rb") as stream:
            stream.seek(offset)
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        for record in parse(whole):
            if record.get("stage") == stage.name:
                seen.take(record, now)
        return offset + len(whole)

    def _died(self, stage: Stage, seen: Watched, code: int, before: int) -> tuple[str, str]:
        if code == RESTART:
            return "restart", ""
        flying = list(seen.flying)
        for case in flying:
            self._case(stage, seen, CRASHED, case, ended(code))
        if flying or len(seen.finished) > before:
            return "restart", ""
        return "broken", f"{ended(code)} before its first case: see log.txt ({self._last_words()})"

    def _case(self, stage: Stage, seen: Watched, status: str, case: str, error: str) -> None:
        seen.finished.add(case)
        self._mend_line()
        append(self.file, stage=stage.name, event=status, at=round(time.time(), 3), case=case, error=error)

    def _say(self, stage: Stage, status: str, reason: str, started: float, not_run: list[str] | None = None) -> None:
        self._mend_line()
        seconds = round(time.monotonic() - started, 1)
        more = {"reason": reason, "seconds": seconds, "not_run": not_run or []}
        append(self.file, stage=stage.name, event="stage", status=status, **more)
        print(f"{stage.name}: {status}{': ' if reason else ''}{reason} ({seconds} s)", flush=True)

    def _note(self, **more: Any) -> None:
        append(self.file, stage="", event="run", at=round(time.time(), 3), **more)

    def _mend_line(self) -> None:
        """A process that was killed may have left half a line."""
        with self.file.open("rb+") as stream:
            size = stream.seek(0, os.SEEK_END)
            if size:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")

    def _last_words(self) -> str:
        lines = self.log.read_bytes()[-4000:].decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip() and not line.startswith(("  File", "---"))]
        return said[-1][:200] if said else "nothing there"

    def trim_log(self) -> None:
        """Keep the beginning and the end of a log that is too long to be carried home."""
        if not self.log.is_file() or self.log.stat().st_size <= LOG_BYTES:
            return
        text = self.log.read_bytes()
        half = LOG_BYTES // 2
        self.log.write_bytes(text[:half] + b"\n... cut ...\n" + text[-half:])
