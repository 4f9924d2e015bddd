"""ComfyUI in the browser with the pack, the demo checkpoint and the example workflows adapted to it."""

from __future__ import annotations

import argparse
import json
import os
import webbrowser
from pathlib import Path

from devkit import workflow
from devkit.host import Server
from devkit.paths import CACHE, WORKFLOWS

from .adapt import for_demo
from .run import CALIBRATION, PROMPTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8188)
    arguments = parser.parse_args()
    with Server(CACHE / "serve", {"checkpoints": [arguments.checkpoint]}, port=arguments.port) as server:
        names = put_workflows(server, arguments.checkpoint.name)
        print(f"{server.address}  (workflows: {', '.join(names)}; Ctrl-C ends it; log: {server.log})", flush=True)
        if "DISPLAY" in os.environ or os.name == "nt" or os.uname().sysname == "Darwin":
            webbrowser.open(server.address)
        try:
            return server.wait()
        except KeyboardInterrupt:
            return 0


def put_workflows(server: Server, checkpoint: str) -> list[str]:
    """Write the example workflows, set to the demo checkpoint, where the front end lists a person's workflows."""
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    folder = server.base / "user" / "default" / "workflows"
    folder.mkdir(parents=True, exist_ok=True)
    info = server.client.object_info()
    names = []
    for source in sorted(WORKFLOWS.glob("*.json")):
        adapted = for_demo(workflow.load(source), info, checkpoint, prompts[0], prompts[-CALIBRATION:])
        name = f"demo_{source.name}"
        (folder / name).write_text(json.dumps(adapted), encoding="utf-8")
        names.append(name)
    return names


if __name__ == "__main__":
    raise SystemExit(main())
