"""Set-up, workflow conversion, the client's reading of the host, and the stand-ins; nothing here needs a server."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import urllib.error
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devkit import client, host, processors, setup, workflow
from devkit.environment import environment
from devkit.paths import ROOT, STANDINS, WORKFLOWS

# --- set-up -----------------------------------------------------------------------------------------------------------


def test_requirements_of_the_host_come_without_torch_and_its_companions():
    text = "torch\ntorchsde\ntorchvision\ntorchaudio>=2\nnumpy>=1.25.0 # arrays\n\n# note\nSQLAlchemy>=2.0\n"
    assert setup.host_requirements(text) == ["torchsde", "numpy>=1.25.0", "SQLAlchemy>=2.0"]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set-up pointed at an empty folder, with no network: every pip call fails."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(setup, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(setup, "HOST_CACHE", tmp_path / "comfyui")
    monkeypatch.setattr(setup, "venv_python", lambda: tmp_path / ".venv" / "bin" / "python")
    monkeypatch.setattr(setup, "host_dir", lambda: tmp_path / "comfyui" / "src")
    monkeypatch.setattr(setup.subprocess, "call", lambda *_, **__: 1)
    return tmp_path


def test_a_failed_download_says_what_to_do(fresh: Path):
    with pytest.raises(setup.SetupError, match="COMFYUI_PATH") as failure:
        setup.ensure_host()
    assert str(failure.value).count(".") == str(failure.value).count("==2.6.0") * 2 + 1  # one sentence
    assert not (fresh / "comfyui" / "src").exists()


def test_a_failed_installation_says_what_to_do_and_leaves_no_stamp(fresh: Path):
    (fresh / ".venv").mkdir()
    (fresh / "requirements.txt").write_text("numpy\n")
    with pytest.raises(setup.SetupError, match="run the same command again"):
        setup.install(fresh)
    assert list((fresh / ".venv").iterdir()) == []


def test_installing_twice_does_nothing_the_second_time(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[list[str]] = []
    monkeypatch.setattr(setup.subprocess, "call", lambda command, **_: calls.append(command) or 0)
    (fresh / ".venv").mkdir()
    (fresh / "requirements.txt").write_text("numpy\nspandrel\ntorch\n")
    setup.install(fresh)
    assert f"torch=={setup.TORCH}" in calls[0]
    with_dependencies = [c for c in calls if "--no-deps" not in c]
    assert not any("spandrel" in c for c in with_dependencies), "spandrel with dependencies pulls another torch"
    assert all("-c" in c for c in with_dependencies[1:]), "every step after torch's holds torch"
    first = len(calls)
    setup.install(fresh)
    assert len(calls) == first
    (fresh / "requirements.txt").write_text("numpy\nspandrel\ntorch\nscipy\n")
    setup.install(fresh)
    assert len(calls) == 2 * first, "other requirements: installed again"


def test_another_comfyui_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(setup.SetupError, match=r"no main\.py"):
        setup.ensure_host()
    (tmp_path / "main.py").touch()
    assert setup.ensure_host() == tmp_path


def _archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    return path


def test_only_the_host_is_unpacked(tmp_path: Path):
    names = ["pkg/vendor/ComfyUI/main.py", "pkg/vendor/ComfyUI/comfy/sd.py", "pkg/setup.py", "pkg/vendor/other/x.py"]
    names += ["pkg/vendor/ComfyUI/../../../../escape.py"]
    target = tmp_path / "src"
    setup._extract_inside(_archive(tmp_path / "a.tar.gz", names), target)
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.py"))
    assert found == ["src/comfy/sd.py", "src/main.py"]


def test_an_archive_without_the_host_is_refused(tmp_path: Path):
    with pytest.raises(setup.SetupError, match="set COMFYUI_PATH"):
        setup._extract_inside(_archive(tmp_path / "a.tar.gz", ["pkg/setup.py"]), tmp_path / "src")


def test_another_archive_is_refused(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    def download(command: list[str], **_: Any) -> int:
        _archive(Path(command[-1]) / "pkg.tar.gz", ["pkg/vendor/ComfyUI/main.py"])
        return 0

    monkeypatch.setattr(setup.subprocess, "call", download)
    with pytest.raises(setup.SetupError, match="SHA-256"):
        setup.ensure_host()
    assert not (fresh / "comfyui" / "src").exists()


# --- dev.py -----------------------------------------------------------------------------------------------------------


BENCHMARK = 'if __name__ == "__main__":\n    pass\n'


def _dev() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dev(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """dev.py with set-up done."""
    module = _dev()
    monkeypatch.setattr(module.setup, "ensure", lambda *_: Path("python"))
    monkeypatch.setattr(module, "demo_checkpoint", lambda _: "demo.safetensors")
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    return module


def _call(dev: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, list[list[str]]]:
    commands: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["dev.py", *arguments])
    monkeypatch.setattr(dev, "run", lambda command, timed=False: commands.append(command) or 0)
    return dev.main(), commands


def test_an_unknown_benchmark_lists_what_there_is(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "quality.py").write_text(BENCHMARK)
    (tmp_path / "shared.py").touch()
    for room, file in (("speed", "__main__.py"), ("parts", "shared.py")):
        (tmp_path / room).mkdir()
        (tmp_path / room / file).touch()
    monkeypatch.setattr(dev, "BENCH", tmp_path)
    code, commands = _call(dev, monkeypatch, "bench", "nonsense")
    assert (code, commands) == (2, [])
    assert "there is: quality, speed." in capsys.readouterr().err


def test_a_benchmark_gets_the_demo_by_default_and_paths_from_where_it_was_called(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "quality.py").write_text(BENCHMARK)
    (tmp_path / "p.txt").touch()
    monkeypatch.setattr(dev, "BENCH", tmp_path)
    monkeypatch.chdir(tmp_path)
    code, [command] = _call(dev, monkeypatch, "bench", "quality", "--json", "f.json")
    assert code == 0
    assert command[1:3] == ["-m", "bench.quality"]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options["--checkpoint"] == "demo.safetensors"
    assert options["--prompts"].endswith("prompts.txt") and Path(options["--prompts"]).is_file()
    assert options["--json"] == str(tmp_path / "f.json")
    more = ["--prompts", "p.txt", "--device", "cuda", "--count", "3"]
    _, [command] = _call(dev, monkeypatch, "bench", "quality", *more)
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert (options["--prompts"], options["--device"], options["--count"]) == (str(tmp_path / "p.txt"), "cuda", "3")


def test_threads_of_a_benchmark_wait_as_those_of_users_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert environment()["OMP_WAIT_POLICY"] == "PASSIVE" and "OMP_WAIT_POLICY" not in environment(timed=True)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert environment()["OMP_WAIT_POLICY"] == environment(timed=True)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_missing_file_is_one_sentence(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "quality.py").write_text(BENCHMARK)
    monkeypatch.setattr(dev, "BENCH", tmp_path)
    code, commands = _call(dev, monkeypatch, "bench", "quality", "--prompts", "absent.txt")
    assert (code, commands) == (1, [])
    assert "absent.txt" in capsys.readouterr().err


def test_test_runs_every_check_and_fails_if_one_does(dev: ModuleType, monkeypatch: pytest.MonkeyPatch):
    code, commands = _call(dev, monkeypatch, "test", "-k", "some")
    assert code == 0
    assert [c[2] for c in commands] == ["ruff", "ruff", "mypy", "pytest"]
    assert commands[-1][3:] == ["-k", "some"]
    monkeypatch.setattr(dev, "run", lambda command: int("mypy" in command))
    assert dev.main() == 1


CPUINFO = (
    "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni\nprocessor\t: 1\nflags\t\t: avx_vnni\n"
)


@pytest.fixture
def ran(dev: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[tuple]]:
    """Of a call of dev.py on the processor of CPUINFO: the commands, each with its part of the environment."""
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(dev, "CPUINFO", tmp_path / "cpuinfo")

    def call(*arguments: str) -> list[tuple[list[str], dict[str, str]]]:
        found: list[tuple[list[str], dict[str, str]]] = []
        monkeypatch.setattr(sys, "argv", ["dev.py", *arguments])
        monkeypatch.setattr(dev, "run", lambda command, **variables: found.append((command[3:], variables)) or 0)
        assert dev.main() == 0
        return [one for one in found if "-m" not in one[0] or "rounding" in one[0]][3:]

    return call


def test_the_tests_run_as_another_processor(ran: Callable[..., list[tuple]]):
    [(command, variables)] = ran("test", "--as", "avx512-vnni", "--shuffle", "7", "tests/unit")
    assert variables == {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}
    assert command == ["-p", "randomly", "--randomly-seed=7", "tests/unit"]
    [(command, variables)] = ran("test", "--threads", "2")
    assert (command, variables) == ([], {"OMP_NUM_THREADS": "2"})


def test_without_a_wish_the_touchy_tests_run_as_others_too(
    ran: Callable[..., list[tuple]], capsys: pytest.CaptureFixture[str]
):
    (touchy, played), (everything, own) = ran("test")
    assert touchy == ["-n", "2", "--dist", "loadfile", "-q", "-m", "rounding"]
    assert played == {"OMP_NUM_THREADS": "1", **processors.PROCESSORS["avx2"].variables}
    assert (everything, own) == (["-n", "2", "--dist", "loadfile"], {"OMP_NUM_THREADS": "1"})
    assert "as avx2-vnni: left out. This processor has no avx_vnni" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "says"), [("amx", "has no amx_int8"), ("z80", "there is: amx, avx512-bf16")])
def test_a_processor_that_cannot_be_played_is_one_sentence(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str,
    says: str,
):  # fmt: skip
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(dev, "CPUINFO", tmp_path / "cpuinfo")
    assert _call(dev, monkeypatch, "test", "--as", name) == (1, [])
    assert says in capsys.readouterr().err
    if name == "amx":  # where nobody says what the processor has, it is tried
        assert processors.variables(name, "")


# --- workflows --------------------------------------------------------------------------------------------------------

SCHEMAS: dict[str, Any] = {
    "Load": {"input": {"required": {"file": [["a", "b"], {}]}}, "display_name": "Load It"},
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"control_after_generate": "fixed"}],
                "cfg": ["FLOAT", {}],
                "name": ["COMBO", {"options": ["x"]}],
                "forced": ["STRING", {"forceInput": True}],
            },
            "optional": {"note": ["STRING", {"multiline": True}], "more": ["MODEL", {}]},
        }
    },
    "Old": {"input": {"required": {"noise_seed": ["INT", {}], "steps": ["INT", {}]}}},
    "Patch": {"input": {"required": {"strength": ["FLOAT", {}], "text": ["STRING", {}], "model": ["MODEL"]}}},
}


def _node(key: int, kind: str, links: dict[str, int] | None = None, values: Any = (), **more: Any) -> dict[str, Any]:
    inputs = [{"name": name, "type": "MODEL", "link": link} for name, link in (links or {}).items()]
    outputs = [{"name": "MODEL", "type": "MODEL"}]
    return {"id": key, "type": kind, "inputs": inputs, "outputs": outputs, "widgets_values": values, **more}


def _convert(nodes: list[dict[str, Any]], links: list[list[Any]]) -> workflow.Prompt:
    return workflow.to_prompt({"nodes": nodes, "links": links}, SCHEMAS)


def test_widgets_links_and_titles():
    sample = _node(2, "Sample", {"model": 1, "more": None}, [7, "randomize", 4.5, "x", "a\nb"], title="Mine")
    prompt = _convert([_node(1, "Load", values=["b"]), sample], [[1, 1, 0, 2, 0, "MODEL"]])
    assert prompt["1"] == {"class_type": "Load", "inputs": {"file": "b"}, "_meta": {"title": "Load It"}}
    assert prompt["2"]["inputs"] == {"seed": 7, "cfg": 4.5, "name": "x", "note": "a\nb", "model": ["1", 0]}
    assert workflow.find(prompt, "Sample", "Mine") == "2"


def test_seeds_of_old_nodes_have_a_control_too():
    assert _convert([_node(1, "Old", values=[5, "fixed", 20])], [])["1"]["inputs"] == {"noise_seed": 5, "steps": 20}


def test_a_linked_widget_takes_the_link_and_keeps_its_place():
    nodes = [_node(1, "Load", values=["a"]), _node(2, "Sample", {"cfg": 1}, [7, "fixed", 4.5, "x", "n"])]
    inputs = _convert(nodes, [[1, 1, 0, 2, 0, "FLOAT"]])["2"]["inputs"]
    assert inputs["cfg"] == ["1", 0] and inputs["name"] == "x"


def test_fewer_saved_values_than_widgets_leave_the_rest_out():
    assert _convert([_node(1, "Sample", values=[7, "fixed", 2.0])], [])["1"]["inputs"] == {"seed": 7, "cfg": 2.0}


def test_values_saved_by_name():
    assert _convert([_node(1, "Load", values={"file": "b"})], [])["1"]["inputs"] == {"file": "b"}


@pytest.mark.parametrize("between", ["Reroute", "Patch"])
def test_reroutes_and_bypassed_nodes_pass_through(between: str):
    middle = _node(2, between, {"model": 1}, [1.0, "t"], mode=workflow.BYPASSED if between == "Patch" else 0)
    nodes = [_node(1, "Load", values=["a"]), middle, _node(3, "Sample", {"model": 2}, [1, "fixed", 2.0, "x", ""])]
    prompt = _convert(nodes, [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"]])
    assert set(prompt) == {"1", "3"} and prompt["3"]["inputs"]["model"] == ["1", 0]


def test_muted_nodes_and_notes_vanish_with_their_links():
    nodes = [_node(1, "Load", values=["a"], mode=workflow.MUTED), _node(2, "Sample", {"model": 1}), _node(3, "Note")]
    prompt = _convert([*nodes, _node(4, "MarkdownNote")], [[1, 1, 0, 2, 0, "MODEL"]])
    assert set(prompt) == {"2"} and "model" not in prompt["2"]["inputs"]


def test_a_primitive_gives_its_value():
    nodes = [_node(1, "PrimitiveNode", values=[11, "fixed"]), _node(2, "Old", {"steps": 1}, [0, "fixed", 1])]
    assert _convert(nodes, [[1, 1, 0, 2, 0, "INT"]])["2"]["inputs"]["steps"] == 11


def test_unknown_nodes_and_subgraphs_are_refused():
    with pytest.raises(workflow.WorkflowError, match="Nonsense"):
        _convert([_node(1, "Nonsense")], [])
    with pytest.raises(workflow.WorkflowError, match="subgraphs"):
        workflow.to_prompt({"nodes": [], "links": [], "definitions": {"subgraphs": [{}]}}, SCHEMAS)


def test_find_wants_exactly_one():
    prompt = _convert([_node(1, "Load", values=["a"]), _node(2, "Load", values=["a"])], [])
    for kind in ("Load", "Sample"):
        with pytest.raises(workflow.WorkflowError, match=kind):
            workflow.find(prompt, kind)


@given(st.sampled_from(["seed", "cfg", "name", "note"]), st.text(max_size=5))
def test_a_widget_that_is_set_is_read_back(name: str, value: str):
    node = _node(1, "Sample", values=[7, "fixed", 4.5, "x", "n"])
    before = dict(workflow.widgets(node, SCHEMAS["Sample"]))
    workflow.set_widget(node, SCHEMAS["Sample"], name, value)
    assert dict(workflow.widgets(node, SCHEMAS["Sample"])) == before | {name: value}


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_links_of_the_example_workflows_fit_both_ends(path: Path):
    shipped = workflow.load(path)
    nodes = {node["id"]: node for node in shipped["nodes"]}
    assert shipped["last_node_id"] == max(nodes) and shipped["last_link_id"] == max(
        link[0] for link in shipped["links"]
    )
    for key, source, slot, target, place, kind in shipped["links"]:
        assert key in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == key
        assert kind == nodes[source]["outputs"][slot]["type"]
    linked = [i["link"] for node in nodes.values() for i in node.get("inputs", []) if i["link"] is not None]
    assert sorted(linked) == sorted(link[0] for link in shipped["links"])


# --- the client -------------------------------------------------------------------------------------------------------


class Socket:
    """A websocket that has its messages ready."""

    def __init__(self, *events: Any):
        self.events = [e if isinstance(e, bytes) else json.dumps({"type": e[0], "data": e[1]}) for e in events]

    def recv(self) -> Any:
        return self.events.pop(0)


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., client.Result]:
    one = client.Client("nowhere:1")
    monkeypatch.setattr(one, "history", lambda _: {"outputs": {"9": {"text": ["a", "b"]}}})
    return lambda *events, seen=None: one._follow(Socket(*events), "p", seen, 1e18)


END = ("executing", {"node": None, "prompt_id": "p"})


def test_following_a_run(follow: Callable[..., client.Result]):
    seen: list[tuple[str, float, float]] = []
    result = follow(
        b"preview",
        ("status", {}),
        ("execution_cached", {"nodes": ["1"], "prompt_id": "p"}),
        ("executing", {"node": "2", "prompt_id": "p"}),
        ("progress", {"node": "2", "value": 1, "max": 4, "prompt_id": "p"}),
        ("progress", {"node": "2", "value": 1, "max": 4, "prompt_id": "another"}),
        ("executing", {"node": None, "prompt_id": "another"}),
        END,
        seen=lambda *step: seen.append(step),
    )
    assert result.cached == {"1"} and set(result.seconds) == {"2"}
    assert seen == [("2", 1, 4)]
    assert result.text("9") == "a\nb"


def test_a_failed_node_raises(follow: Callable[..., client.Result]):
    failure = {"prompt_id": "p", "node_id": "4", "node_type": "KSampler", "exception_message": "no\n"}
    with pytest.raises(client.HostError) as raised:
        follow(("execution_error", failure | {"exception_type": "ValueError"}), END)
    error = raised.value
    assert (error.node_id, error.node_type, error.message, error.exception_type) == (
        "4",
        "KSampler",
        "no",
        "ValueError",
    )


def test_an_interrupted_run_raises(follow: Callable[..., client.Result]):
    with pytest.raises(client.Interrupted):
        follow(("execution_interrupted", {"prompt_id": "p", "node_id": "4", "node_type": "KSampler"}), END)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"error": {"message": "Cannot execute"}, "node_errors": {}}', "Cannot execute"),
        ('{"error": "bare"}', "bare"),
        ("<html>", "400"),
    ],
)
def test_refusals_keep_the_hosts_message(body: str, expected: str):
    error = urllib.error.HTTPError("u", 400, "Bad", {}, io.BytesIO(body.encode()))  # type: ignore[arg-type]
    assert expected in str(client._refusal("/prompt", error))


def test_a_refused_node_is_named():
    first = {"message": "Value not in list", "details": "name: 'y'", "type": "value_not_in_list"}
    body = json.dumps({"error": {"message": "m"}, "node_errors": {"7": {"errors": [first], "class_type": "Sample"}}})
    found = client._refusal("/prompt", urllib.error.HTTPError("u", 400, "Bad", {}, io.BytesIO(body.encode())))  # type: ignore[arg-type]
    assert (found.node_id, found.node_type) == ("7", "Sample") and "Value not in list" in str(found)


# --- the host process -------------------------------------------------------------------------------------------------


def test_place_links_or_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "pack"
    (source / "tests").mkdir(parents=True)
    (source / "nodes.py").write_text("1")
    host.place(source, tmp_path / "there" / "pack")
    assert (tmp_path / "there" / "pack" / "nodes.py").read_text() == "1"

    def forbidden(*_: Any, **__: Any) -> None:
        raise OSError("no right to make links")

    monkeypatch.setattr(Path, "symlink_to", forbidden)
    host.place(source, tmp_path / "there" / "pack")
    host.place(source / "nodes.py", tmp_path / "there" / "file.py")
    assert not (tmp_path / "there" / "pack").is_symlink()
    assert [p.name for p in (tmp_path / "there" / "pack").iterdir()] == ["nodes.py"]
    assert (tmp_path / "there" / "file.py").read_text() == "1"
    assert source.is_dir() and (source / "tests").is_dir(), "the source was touched"


def test_a_host_that_ends_at_once_is_reported_with_its_log(tmp_path: Path):
    server = host.Server(tmp_path / "base", arguments=["--no-such-flag"])
    with pytest.raises(RuntimeError, match="no-such-flag"):
        server.start()


# --- stand-ins --------------------------------------------------------------------------------------------------------


def _python(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, [STANDINS, *folders]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


def test_stand_ins_take_any_name_and_fail_only_when_called():
    code = """
from torchvision.transforms import functional as F, InterpolationMode
import torchaudio.functional
default = InterpolationMode.BICUBIC
class Mine(torchaudio.functional.Thing): pass
try:
    F.resize(1)
except RuntimeError as error:
    print(error)
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torchvision.transforms.functional.resize is only a stand-in")


def test_a_real_package_is_preferred_and_a_broken_one_replaced(tmp_path: Path):
    for name, text in (
        ("torchvision", "import torchvision.sub\nreal = True\n"),
        ("torchaudio", "raise OSError('x')\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        (tmp_path / name / "sub.py").write_text("here = 1\n")
    code = "import torchvision.sub, torchaudio\nprint(torchvision.real, torchvision.sub.here, torchaudio.load)"
    done = _python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True 1 <tfmq_standins.Missing")
