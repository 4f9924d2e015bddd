"""Triton is tried on a device before a layer is given to it; what is wrong is a sentence, and said once."""

import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from tfmq.geometry import Geometry
from tfmq.kernels import table
from tfmq.kernels.table import LINEAR_STATIC
from tfmq.kernels.triton import backend as triton_backend
from tfmq.kernels.triton import probe as triton_probe

from .test_triton import needs_triton

CPU = torch.device("cpu")
LAYER = Geometry((4, 4))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_probe, "_found", {})
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
    assert reason.startswith("Triton cannot run here (")
    assert len([r for r in caplog.records if "Triton is not used" in r.getMessage()]) == 1


def test_a_device_is_tried_once(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(device: torch.device) -> str | None:
        tried.append(device)
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(triton_probe, "_try", broken)
    for n in range(1, 5):
        assert table.pick(LINEAR_STATIC, CPU, Geometry((n, n))).name == "int_mm"
        assert "no C compiler" in table.refusals(LINEAR_STATIC, CPU, Geometry((n, n)))["triton"]
    assert tried == [CPU]


def test_memory_that_runs_out_says_nothing(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device) -> str | None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(triton_probe, "_try", full)
    assert triton_probe.fault(CPU) is None
    monkeypatch.setattr(triton_probe, "_try", lambda device: "wrong")
    assert triton_probe.fault(CPU) == "wrong"


def test_an_interrupt_goes_through(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(device: torch.device) -> str | None:
        raise KeyboardInterrupt

    monkeypatch.setattr(triton_probe, "_try", interrupted)
    with pytest.raises(KeyboardInterrupt):
        triton_probe.fault(CPU)
    monkeypatch.setattr(triton_probe, "_try", lambda device: None)
    assert triton_probe.fault(CPU) is None  # the lock is free


def test_nothing_is_tried_while_a_graph_is_captured(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_probe, "_try", lambda device: "broken")
    with monkeypatch.context() as capture:
        capture.setattr(triton_probe, "capturing", lambda: True)
        assert triton_probe.undecided(CPU)
        assert table.pick(LINEAR_STATIC, CPU, LAYER).name == "triton"
    assert table.pick(LINEAR_STATIC, CPU, LAYER).name == "int_mm", "the answer of then is not kept"
    assert not triton_probe.undecided(CPU)


def test_nothing_is_tried_while_torch_compile_traces(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_probe, "_try", lambda device: "broken")

    def call(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if table.pick(LINEAR_STATIC, CPU, LAYER).name == "triton" else 2)

    torch._dynamo.reset()
    assert float(torch.compile(call, backend="eager", fullgraph=True)(torch.zeros(()))) == 1
    assert triton_probe._found == {}
    assert table.pick(LINEAR_STATIC, CPU, LAYER).name == "int_mm"


def test_a_gpu_of_another_machine_is_not_tried() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert triton_probe.fault(torch.device("cuda")) is None and triton_probe._found == {}


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
    assert "no C compiler (install gcc" in triton_probe.sentence(error())
    monkeypatch.setenv("CC", str(tmp_path / "gone"))
    assert "no C compiler (install gcc" in triton_probe.sentence(error())
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\nexit 3\n", encoding="utf-8")
    failing.chmod(0o755)
    monkeypatch.setenv("CC", str(failing))
    with monkeypatch.context() as headers:
        (tmp_path / "Python.h").touch()
        headers.setattr(sysconfig, "get_paths", lambda **_: {"include": str(tmp_path)})
        found = error()
        assert triton_probe.sentence(found) == f"Triton cannot compile here: {failing} failed (exit code 3)"
    monkeypatch.setattr(sysconfig, "get_paths", lambda **_: {"include": str(tmp_path / "none")})
    assert "Python's headers are missing" in triton_probe.sentence(found)


def test_a_long_error_is_cut() -> None:
    assert len(triton_probe.sentence(ValueError("x y\n" * 1000))) < 220
