"""A headless ComfyUI server with this pack in it, on a folder of its own."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from .client import Client
from .environment import environment
from .paths import PACK_NAME, ROOT, STANDINS, host_dir

FOLDERS = ("custom_nodes", "models", "user", "output", "input", "temp")
# What is no part of the pack, where it has to be copied.
NOT_PACK = shutil.ignore_patterns(".*", "__pycache__", "demo", "bench", "tests", "devkit", "out*")


class Server:
    """A context manager: `with Server(base, models={"checkpoints": [file]}) as server: server.client.queue(...)`.

    base: the server's folder (models, output, user, ...); what is missing is made, what is there is kept.
    models: files to show in `models/<kind>/`, linked where possible.
    node_packs: further custom node packs (folders), such as those of tests.
    device: "cpu" or "cuda". arguments: further command-line flags of ComfyUI.
    """

    def __init__(
        self,
        base: str | Path,
        models: Mapping[str, Iterable[str | Path]] | None = None,
        node_packs: Iterable[str | Path] = (),
        device: str = "cpu",
        port: int | None = None,
        arguments: Iterable[str] = (),
    ):
        self.base = Path(base).resolve()
        self.port = port or free_port()
        self.log = self.base / "server.log"
        self.client = Client(f"127.0.0.1:{self.port}")
        self._command = _command(self.base, self.port, device, arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file: IO[bytes] | None = None
        for folder in FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        place(ROOT, self.base / "custom_nodes" / PACK_NAME)
        for pack in node_packs:
            place(Path(pack), self.base / "custom_nodes" / Path(pack).name)
        for kind, files in (models or {}).items():
            for file in files:
                place(Path(file), self.base / "models" / kind / Path(file).name)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self, timeout: float = 180.0) -> None:
        """Start the process and wait until it answers; RuntimeError with the end of its log where it does not."""
        self._log_file = open(self.log, "ab")  # noqa: SIM115
        self._process = subprocess.Popen(
            self._command,
            cwd=host_dir(),
            env=_environment(),
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.client.system_stats()
                return
            except (urllib.error.URLError, OSError):
                pass
            if self._process.poll() is not None:
                self.stop()
                raise RuntimeError(f"ComfyUI ended while starting; the end of {self.log}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(
                    f"ComfyUI did not answer within {timeout:.0f} s; the end of {self.log}:\n{self.log_tail()}"
                )
            time.sleep(0.2)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._log_file is not None:
            self._log_file.close()
        self._process = self._log_file = None

    def restart(self) -> None:
        """Stop and start again on the same folder, as a person does."""
        self.stop()
        self.start()

    def wait(self) -> int:
        """Wait for the process to end by itself (a person's Ctrl-C)."""
        assert self._process is not None
        return self._process.wait()

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _environment() -> dict[str, str]:
    """The stand-ins are in the host's reach, and it ends when this process does."""
    path = [str(STANDINS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment(PYTHONPATH=os.pathsep.join(path), TFMQ_OWNER=str(os.getpid()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def place(source: Path, target: Path) -> None:
    """Show `source` (file or folder) at `target`: a link, or a copy where links are not allowed."""
    source = source.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove(target)
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:  # Windows without the right to make links
        if source.is_dir():
            shutil.copytree(source, target, ignore=NOT_PACK)
        else:
            try:
                os.link(source, target)
            except OSError:
                shutil.copy2(source, target)


def _remove(target: Path) -> None:
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)


def _command(base: Path, port: int, device: str, arguments: Iterable[str]) -> list[str]:
    command = [sys.executable, "main.py", "--base-directory", str(base), "--port", str(port)]
    for name in ("user", "output", "input", "temp"):
        command += [f"--{name}-directory", str(base / name)]
    command += [
        "--database-url",
        "sqlite:///:memory:",
        "--disable-api-nodes",
        "--disable-auto-launch",
        "--cache-classic",
    ]
    if device == "cpu":
        command.append("--cpu")
    return [*command, *arguments]
