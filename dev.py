"""The developer's door: `python dev.py {demo,test,serve,bench} [...]`. Standard library only."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from devkit import processors, setup
from devkit.environment import environment
from devkit.paths import ROOT

BENCH = ROOT / "bench"
PROMPTS = ROOT / "demo" / "prompts.txt"
CPUINFO = Path("/proc/cpuinfo")
# In CI the tests whose verdict hangs on how a processor rounds run as these too, where this one can play them.
ALSO_AS = ("avx2-vnni", "avx2")


def main() -> int:
    arguments, rest = _parser().parse_known_args()
    if rest and arguments.command not in ("test", "bench"):
        _parser().error(f"unknown arguments for {arguments.command}: {' '.join(rest)}")
    # Paths on the command line are the caller's; everything below runs in the root.
    started_in = Path.cwd()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        python = str(setup.ensure(arguments.use_installed_torch))
        if arguments.command == "test":
            return test(python, rest, arguments)
        checkpoint = demo_checkpoint(python)
        if arguments.command == "demo":
            out = started_in / arguments.out
            return run([python, "-m", "demo.run", "--checkpoint", checkpoint, "--out", str(out)])
        if arguments.command == "serve":
            return run([python, "-m", "demo.serve", "--checkpoint", checkpoint, "--port", str(arguments.port)])
        return bench(python, checkpoint, arguments, rest, started_in)
    except setup.SetupError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def test(python: str, pytest_arguments: list[str], arguments: argparse.Namespace) -> int:
    """Lint, format, types, then the tests; every step runs, and the tests come last."""
    machine = _machine(arguments)
    demo_checkpoint(python)
    checks = {
        "ruff check": [python, "-m", "ruff", "check", "."],
        "ruff format": [python, "-m", "ruff", "format", "--check", "."],
        "mypy": [python, "-m", "mypy"],
    }
    failed = []
    for name, command in checks.items():
        print(f"== {name}", flush=True)
        if run(command) != 0:
            failed.append(name)
    # All tests share two processes, a file at a time, with a thread each.
    shared = [] if pytest_arguments or arguments.threads else ["-n", "2", "--dist", "loadfile"]
    threads = {"OMP_NUM_THREADS": str(arguments.threads or 1)} if shared or arguments.threads else {}
    order = [] if arguments.shuffle is None else ["-p", "randomly", f"--randomly-seed={arguments.shuffle}"]
    everything = not pytest_arguments and not machine and arguments.threads is None and arguments.shuffle is None
    for name in ALSO_AS if everything else ():
        try:
            played = processors.variables(name, _cpuinfo())
        except ValueError as error:
            print(f"== pytest as {name}: left out. {error}", flush=True)
            continue
        print(f"== pytest as {name}", flush=True)
        if run([python, "-m", "pytest", *shared, "-q", "-m", "rounding"], **threads, **played) != 0:
            failed.append(f"pytest as {name}")
    print(f"== pytest{f' as {arguments.machine}' if machine else ''}", flush=True)
    if failed:
        print(f"failed before the tests: {', '.join(failed)}", flush=True)
    command = [python, "-m", "pytest", *shared, *order, *pytest_arguments]
    return run(command, **threads, **machine) or int(bool(failed))


def _machine(arguments: argparse.Namespace) -> dict[str, str]:
    """Variables that make this the processor of `--as`."""
    if arguments.machine is None:
        return {}
    try:
        return processors.variables(arguments.machine, _cpuinfo())
    except ValueError as error:
        raise setup.SetupError(str(error)) from None


def _cpuinfo() -> str:
    try:
        return CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return ""


def bench(python: str, checkpoint: str, arguments: argparse.Namespace, rest: list[str], started_in: Path) -> int:
    """Run `bench.NAME` with the demo checkpoint and the demo prompts where none are given."""
    # The others are what benchmarks share.
    rooms = {path.parent.name for path in BENCH.glob("*/__main__.py")}
    known = sorted(rooms | {p.stem for p in BENCH.glob("*.py") if "__main__" in p.read_text(encoding="utf-8")})
    if arguments.name not in known:
        print(
            f"dev.py: there is no benchmark {arguments.name!r}; there is: {', '.join(known) or 'none yet'}.",
            file=sys.stderr,
        )
        return 2
    command = [python, "-m", f"bench.{arguments.name}"]
    if arguments.device or arguments.name != "gpu_check":  # which looks for a GPU by itself
        command += ["--device", arguments.device or "cpu"]
    command += ["--checkpoint", _existing(started_in, arguments.checkpoint) or checkpoint]
    command += ["--prompts", _existing(started_in, arguments.prompts) or str(PROMPTS)]
    if arguments.json:
        command += ["--json", str(started_in / arguments.json)]
    return run(command + rest, timed=True)


def demo_checkpoint(python: str) -> str:
    """Path of the demo checkpoint, assembled where it is missing or out of date."""
    answer = subprocess.run([python, "-m", "demo.checkpoint"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if answer.returncode != 0:
        raise setup.SetupError(
            "The demo checkpoint could not be assembled (the reason is above): mend that and run again."
        )
    return answer.stdout.strip().splitlines()[-1]


def run(command: list[str], timed: bool = False, **variables: str) -> int:
    """Run to the end, with `variables` in its environment; it is not left behind when this process is told to end."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment(timed, **variables))
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _existing(started_in: Path, given: str | None) -> str | None:
    if given is None:
        return None
    path = started_in / given
    if not path.is_file():
        raise setup.SetupError(f"There is no file {path}: give the path of an existing file.")
    return str(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dev.py", description=__doc__)
    parser.add_argument("--use-installed-torch", action="store_true", help="let a new .venv use this Python's torch")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="quantize the demo checkpoint in a real ComfyUI; pictures and report")
    demo.add_argument("--out", default="out", metavar="DIR", help="where pictures and report go (default: out)")
    test = commands.add_parser("test", help="ruff, mypy, pytest; further arguments go to pytest")
    test.add_argument(
        "--as", dest="machine", metavar="NAME",
        help=f"run the tests as another processor: {', '.join(processors.PROCESSORS)}",
    )  # fmt: skip
    test.add_argument("--threads", type=int, metavar="N", help="in one process of N threads (default: two of one)")
    test.add_argument("--shuffle", type=int, metavar="SEED", help="in a random order")
    serve = commands.add_parser("serve", help="ComfyUI in the browser with the pack and the demo checkpoint")
    serve.add_argument("--port", type=int, default=8188)
    bench = commands.add_parser("bench", help="run a benchmark of bench/; further arguments go to it")
    bench.add_argument("name")
    bench.add_argument("--checkpoint", metavar="FILE", help="an SD1.5-format checkpoint (default: the demo's)")
    bench.add_argument("--prompts", metavar="FILE", help="a text file, one prompt per line (default: the demo's)")
    bench.add_argument("--device", choices=["cpu", "cuda"], help="default: cpu; of gpu_check: a GPU where one is")
    bench.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
