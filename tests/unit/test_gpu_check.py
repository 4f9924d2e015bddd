"""bench/gpu_check.py on a machine without a GPU: to its end, and with faults planted in its stages."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench.gpu import plan
from bench.gpu.case import parse
from bench.gpu.summary import LINES, summary
from devkit.paths import ROOT

needs_triton = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="no Triton for this system"
)


class Done(NamedTuple):
    code: int
    summary: list[str]
    records: list[dict[str, Any]]

    def events(self, stage: str) -> dict[str, str]:
        """Case -> how it ended."""
        return {
            r["case"]: r["event"] for r in self.records if r["stage"] == stage and "case" in r and r["event"] != "start"
        }

    def stage(self, name: str) -> dict[str, Any]:
        return next(r for r in self.records if r["stage"] == name and r["event"] == "stage")


def check(out: Path, *more: str, plant: str | None = None, budget: int = 60) -> Done:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    environment.pop("COMFYUI_PATH", None)
    if plant:
        environment["TFMQ_GPU_CHECK_PLANT"] = plant
    command = [
        sys.executable,
        "-m",
        "bench.gpu_check",
        "--budget",
        str(budget),
        "--device",
        "cpu",
        "--out",
        str(out),
        *more,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    lines = (out / "summary.txt").read_text(encoding="utf-8").splitlines()
    assert done.stdout.splitlines()[-len(lines) :] == lines and len(lines) <= LINES, done.stdout + done.stderr
    assert {path.name for path in out.iterdir()} <= {"results.jsonl", "summary.txt", "log.txt"}
    return Done(done.returncode, lines, list(parse((out / "results.jsonl").read_bytes())))


@needs_triton
def test_a_machine_without_a_gpu(tmp_path: Path) -> None:
    found = check(tmp_path / "out")
    assert found.code == 0, found.summary
    assert [r["stage"] for r in found.records if r["event"] == "stage"] == list(plan.NAMES)
    for stage in plan.STAGES:
        assert found.stage(stage.name)["status"] == ("ran" if stage.on_cpu else "absent")
        line = next(line for line in found.summary if line.startswith(stage.name))
        assert stage.on_cpu or "needs a GPU" in line
        ended = found.events(stage.name)
        assert set(ended.values()) == ({"ok"} if stage.on_cpu else set())
    assert {"codes float16", "int4 float32", "views", "layouts"} <= set(found.events("parity"))
    compiled = [r["data"] for r in found.records if r["stage"] == "compile" and r["event"] == "ok"]
    assert {data["instruction"] for data in compiled} == {"wgmma", "mma.sync", None}
    assert all(data["registers"] > 0 and data["spills"] == 0 for data in compiled)


@needs_triton
def test_planted_faults_are_named_and_lose_nothing_else(tmp_path: Path) -> None:
    """A kernel that raises, one that hangs, wrong sums; an error behind which the device answers no more; processes
    that are killed, of a stage and of a part of one."""
    found = check(
        tmp_path / "out", "--stages", "env,compile,parity", "--case-limit", "12", plant="support.planted", budget=120
    )
    assert found.code == 1
    tile = next(name for name in found.events("parity") if name.startswith("tile"))
    died = next(name for name in found.events("compile") if name.startswith("sm_90 quantize"))
    expected = {
        "env": {"versions": "failed", "compiler": "crashed"}, "compile": {died: "crashed"},
        "parity": {"rows bfloat16": "failed", "linear float16": "failed", "int4 float32": "failed",
                   "norms float32": "hung", tile: "wrong", "views": "failed"},
    }  # fmt: skip
    said = " ".join(" ".join(found.summary).split())
    for stage, faults in expected.items():
        ended = found.events(stage)
        assert {case: event for case, event in ended.items() if event != "ok"} == faults
        assert found.stage(stage)["status"] == "ran" and found.stage(stage)["not_run"] == []
        for case, event in faults.items():
            assert f"{event.upper()} {stage}/{case}" in said
    assert {"versions", "compiler"} == set(found.events("env")) and len(found.events("compile")) == 6
    for word in ("SIGSEGV", "SIGKILL", "planted: no such block", "illegal memory access", "no end after 12 s", "1 of "):
        assert word in said


def test_without_triton(tmp_path: Path) -> None:
    found = check(tmp_path / "out", "--stages", "env,compile,parity", plant="support.planted_absence")
    assert found.code == 0, found.summary
    for stage in ("compile", "parity"):
        assert found.stage(stage)["status"] == "absent" and found.stage(stage)["reason"] == "Triton is not installed"


def test_a_stage_that_cannot_begin_and_one_without_time_are_named(tmp_path: Path) -> None:
    found = check(tmp_path / "a", "--stages", "env", plant="support.no_such_module")
    assert found.code == 1 and "BROKEN" in found.summary[1] and "no_such_module" in found.summary[1]
    found = check(tmp_path / "b", "--stages", "env", budget=3)
    assert found.code == 0 and "CUT" in found.summary[1]


def test_stages_share_the_time() -> None:
    """What is given at 330 seconds is what each stage is written for; what is not used goes to the later ones."""
    left = plan.TOTAL
    stages = list(plan.STAGES)
    for index, stage in enumerate(stages):
        own = plan.share(stage, stages[index + 1 :], left)
        if not stage.optional:
            assert own == pytest.approx(max(stage.seconds, plan.ENOUGH), rel=0.05)
        left -= own
    assert left == pytest.approx(0, abs=1)
    assert plan.share(stages[-3], stages[-2:], 200.0) > stages[-3].seconds
    assert plan.share(stages[-1], [], 40.0) == 40.0


def test_a_summary_names_every_failure_however_many() -> None:
    records: list[dict[str, Any]] = [{"stage": "", "event": "run", "stages": list(plan.NAMES)}]
    for number in range(70):
        records.append({"stage": "parity", "event": "wrong", "case": f"case {number}", "error": "off " * 90})
    for stage in plan.NAMES:
        records.append({"stage": stage, "event": "stage", "status": "cut", "reason": "after 50 s", "seconds": 50.0})
    lines = summary(records, 330.0)
    assert len(lines) <= LINES
    for number in range(70):
        assert f"parity/case {number}" in "\n".join(lines)
    assert sum("CUT" in line for line in lines) == len(plan.NAMES)


def test_a_summary_of_figures_that_are_missing_or_odd() -> None:
    records: list[dict[str, Any]] = [
        {"stage": "", "event": "run", "stages": ["env", "ops", "sd15", "host"]},
        {"stage": "ops", "event": "ok", "case": "linear", "data": {
            "median_us": {"fp16": 20.0, "ours_w8a8": 10.0}, "best": {"tile": [64, 64, 64, 1, 4, 4], "us": 5.0},
            "chosen": {"tile": [128, 64, 64, 1, 4, 4], "us": 6.0}}},
        {"stage": "sd15", "event": "ok", "case": "fp16 eager", "data": {"ms": 30.0, "error": 0.001, "peak_mb": 10.0}},
        {"stage": "sd15", "event": "ok", "case": "ours eager", "data": {"ms": 20.0}},
        {"stage": "host", "event": "ok", "case": "Linear static", "data": {"us": "odd"}},
    ]  # fmt: skip
    said = "\n".join(summary([json.loads(json.dumps(record)) for record in records], 100.0))
    layer = next(line for line in said.splitlines() if line.startswith("linear"))
    assert layer.split() == ["linear", "20.0", "-", "-", "-", "10.0", "-", "2.00", "128x64x64x1x4x4", "6.0;",
                             "64x64x64x1x4x4", "5.0"]  # fmt: skip
    assert "sd15 fp16 / ours: eager 1.50" in said and "host: cannot be summed up" in said
    assert "did not end" in said
