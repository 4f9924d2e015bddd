"""A backend is tried on a device before a layer is given to it; what is wrong is a sentence, and said once."""

import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tfmq.geometry import Geometry
from tfmq.kernels import int_mm, kitchen, reference, table, trial
from tfmq.kernels.table import LINEAR_STATIC
from tfmq.kernels.triton import backend as triton_backend
from tfmq.kernels.triton import tune

from .test_triton import needs_triton

CPU = torch.device("cpu")
LAYER = Geometry((4, 4))


def fault(device: torch.device) -> str | None:
    return trial.fault("triton", triton_backend, device)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_found", {})
    monkeypatch.setattr(trial, "_open", set())
    table.pick.cache_clear()
    yield
    table.pick.cache_clear()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table takes a CPU for a GPU that Triton can be imported for."""
    monkeypatch.setattr(triton_backend, "missing", lambda device: None)
    monkeypatch.setattr(table, "BACKENDS", tuple(b for b in table.BACKENDS if b.name != "onednn"))


@needs_triton
def test_a_launch_that_raises_refuses_the_backend(on_cpu: None, caplog: pytest.LogCaptureFixture) -> None:
    """Outside of its interpreter Triton finds no GPU here, so that this launch really raises."""
    assert table.pick(LINEAR_STATIC, CPU, LAYER).name == "int_mm"
    reason = table.refusals(LINEAR_STATIC, CPU, LAYER)["triton"]
    assert reason.startswith("cannot run here (")
    assert len([r for r in caplog.records if "triton is not used on cpu: it cannot run" in r.getMessage()]) == 1


def test_a_device_is_tried_once(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(backend: ModuleType, operation: str, device: torch.device, tolerance: float) -> str | None:
        tried.append((operation, device))
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(trial, "_wrong", broken)
    for n in range(1, 5):
        assert table.pick(LINEAR_STATIC, CPU, Geometry((n, n))).name == "int_mm"
        assert "no C compiler" in table.refusals(LINEAR_STATIC, CPU, Geometry((n, n)))["triton"]
    assert tried == [(LINEAR_STATIC, CPU)]


def test_memory_that_runs_out_says_nothing(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str | None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(trial, "_wrong", full)
    assert fault(CPU) is None and not trial.settled()
    monkeypatch.setattr(trial, "_wrong", lambda *_: "wrong")
    assert fault(CPU) == "wrong" and trial.settled()


@pytest.mark.parametrize("text", ["Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling x"])
def test_memory_runs_out_by_other_names_too(on_cpu: None, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def full(*_: object) -> str | None:
        raise RuntimeError(text)

    monkeypatch.setattr(trial, "_wrong", full)
    assert fault(CPU) is None and not trial.settled()


def test_a_pick_of_a_moment_without_memory_is_not_kept(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str | None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(trial, "_wrong", full)
    geometry = Geometry((72, 64))
    first = table.pick(LINEAR_STATIC, CPU, geometry).name
    monkeypatch.setattr(trial, "_wrong", lambda *_: "computes wrongly here")
    second = table.pick(LINEAR_STATIC, CPU, geometry).name
    assert (first, second) == ("triton", table.pick(LINEAR_STATIC, CPU, Geometry((80, 64))).name) and second != first


def test_an_interrupt_goes_through(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> str | None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "_wrong", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fault(CPU)
    monkeypatch.setattr(trial, "_wrong", lambda *_: None)
    assert fault(CPU) is None  # the lock is free


def test_nothing_is_tried_while_a_graph_is_captured(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_wrong", lambda *_: "broken")
    with monkeypatch.context() as capture:
        capture.setattr(trial, "capturing", lambda: True)
        assert not trial.possible(CPU)
        assert table.pick(LINEAR_STATIC, CPU, LAYER).name == "triton"
    assert table.pick(LINEAR_STATIC, CPU, LAYER).name == "int_mm", "the answer of then is not kept"
    assert trial.possible(CPU)


def test_nothing_is_tried_while_torch_compile_traces(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_wrong", lambda *_: "broken")

    def call(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if table.pick(LINEAR_STATIC, CPU, LAYER).name == "triton" else 2)

    torch._dynamo.reset()
    assert float(torch.compile(call, backend="eager", fullgraph=True)(torch.zeros(()))) == 1
    assert trial._found == {}
    assert table.pick(LINEAR_STATIC, CPU, LAYER).name == "int_mm"


def test_a_gpu_of_another_machine_is_not_tried() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert fault(torch.device("cuda")) is None and trial._found == {}


@needs_triton
def test_what_is_said_where_there_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors are Triton's own."""
    from triton.runtime import build

    def error() -> Exception:
        with pytest.raises((RuntimeError, OSError, subprocess.CalledProcessError)) as caught:
            build._build("nothing", str(source), str(tmp_path), [], [], [], [])
        return caught.value

    source = tmp_path / "nothing.c"
    source.write_text("#include <Python.h>\n", encoding="utf-8")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler (install gcc" in trial.sentence(error())
    monkeypatch.setenv("CC", str(tmp_path / "gone"))
    assert "no C compiler (install gcc" in trial.sentence(error())
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\nexit 3\n", encoding="utf-8")
    failing.chmod(0o755)
    monkeypatch.setenv("CC", str(failing))
    with monkeypatch.context() as headers:
        (tmp_path / "Python.h").touch()
        headers.setattr(sysconfig, "get_paths", lambda **_: {"include": str(tmp_path)})
        found = error()
        assert trial.sentence(found) == f"cannot compile here: {failing} failed (exit code 3)"
    monkeypatch.setattr(sysconfig, "get_paths", lambda **_: {"include": str(tmp_path / "none")})
    assert "Python's headers are missing" in trial.sentence(found)


def test_a_long_error_is_cut() -> None:
    assert len(trial.sentence(ValueError("x y\n" * 1000))) < 220


def test_what_is_right_is_let_pass() -> None:
    for name, backend in (("reference", reference), ("int_mm", int_mm)):
        assert trial.fault(name, backend, CPU) is None


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (lambda sums: sums + 200, "computes wrongly"),
        (lambda sums: torch.full_like(sums.float(), float("nan")), "computes wrongly"),
        (lambda sums: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_trial_sees_wrong_sums_and_errors(monkeypatch: pytest.MonkeyPatch, wrong: Callable, word: str) -> None:
    right = int_mm.matmul
    monkeypatch.setattr(int_mm, "matmul", lambda q, w: wrong(right(q, w)))
    assert word in trial.fault("int_mm", int_mm, CPU)


def test_no_backend_is_tried_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "capturing", lambda: True)
    assert trial.fault("kitchen", kitchen, CPU) is None
    assert trial.once("question", lambda: True, CPU) is None and trial._found == {}


def test_a_trial_times_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, at, seen = tune.Shape("", 40, 48, 64, 1), tune.Machine("a GPU", (9, 0), 132), []
    tuner = tune.Tuner(tmp_path / "kernels.json")
    module = ModuleType("one")
    module.prepare = reference.prepare

    def linear_static(*rest: object) -> torch.Tensor:
        seen.append(tuner.choose(shape, at, lambda tile: seen.append(tile) or 1.0))
        return reference.linear_static(*rest)

    module.linear_static = linear_static
    assert trial.fault("one", module, CPU) is None
    assert seen == [tune.candidates(shape, at)[0]] and not (tmp_path / "kernels.json").exists()
