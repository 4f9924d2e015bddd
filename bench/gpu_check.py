"""All that a GPU can tell about this pack, in one command of a few minutes, with torch, Triton and safetensors.

    python3 -m bench.gpu_check --budget SECONDS --out FOLDER [--device cpu|cuda] [--host FOLDER]

Each stage is a process of its own that adds a JSON line per case to FOLDER/results.jsonl as soon as it has it; what
crashes, hangs or takes a CUDA error along loses that case alone. FOLDER/summary.txt, printed last, names every case
that failed and every stage that was cut short; FOLDER/log.txt has what the processes said. The stage comfy, which needs
a ComfyUI, leaves FOLDER/pictures.pt as well.

With --device cpu the kernels run in Triton's interpreter at toy sizes and a few are compiled for GPUs that are not
here; stages that need a GPU say so. Exit code: 0 if nothing failed (stages that were cut, or had nothing to do here,
count as well), 1 if a case failed, crashed, hung or was wrong or a stage did not begin, 2 for wrong arguments. Standard
library only.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from bench.gpu import plan
from bench.gpu.case import parse
from bench.gpu.summary import failed, summary
from bench.gpu.supervisor import Supervisor


def main() -> int:
    arguments = _arguments()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stages = [stage for stage in plan.STAGES if stage.name in arguments.stages.split(",")]
    run = Supervisor(
        stages, arguments.budget, out, arguments.device, arguments.host, arguments.checkpoint, arguments.case_limit
    )
    for old in (run.file, run.log):
        old.write_bytes(b"")
    started = time.monotonic()
    try:
        run.run()
    finally:  # also when told to end
        records = list(parse(run.file.read_bytes()))
        lines = summary(records, time.monotonic() - started)
        (out / "summary.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
        print("\n".join(["", *lines]), flush=True)
        run.trim_log()
    return 1 if failed(records) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=plan.TOTAL, metavar="SECONDS", help="for all of it (330)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="earlier results there are replaced")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--host", default=os.environ.get("COMFYUI_PATH"), metavar="FOLDER", help="a ComfyUI (default: COMFYUI_PATH)"
    )
    parser.add_argument("--stages", default=",".join(plan.NAMES), help="which, separated by commas")
    parser.add_argument("--case-limit", type=float, metavar="SECONDS", help="in place of each case's own")
    parser.add_argument("--checkpoint", help="of the demo, for the stage comfy (default: it is made)")
    parser.add_argument("--prompts", help="not used")
    arguments = parser.parse_args()
    unknown = set(arguments.stages.split(",")) - set(plan.NAMES)
    if unknown:
        parser.error(f"there is no stage {', '.join(sorted(unknown))}; there is: {', '.join(plan.NAMES)}")
    if arguments.budget <= 0:
        parser.error("--budget is a number of seconds above 0")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
