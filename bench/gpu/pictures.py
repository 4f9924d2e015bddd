"""The demo's graph in this process, on one device: pictures by the float model and by the quantized one.

`python -m bench.gpu.pictures --device cpu|cuda --out FILE` needs a ComfyUI (COMFYUI_PATH). A process of its own, since
the host takes its device when it is imported.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.quality import sampling
from demo import checkpoint
from devkit import inprocess

PICTURES, CALIBRATION = 4, 4


@torch.inference_mode()
def make(device: str, given: str | None) -> dict[str, Any]:
    """`float` and `ours`: [N, 64, 64, 3] in 0..1; `about`: seconds, and the layers by backend."""
    inprocess.use_host(device)
    pack = inprocess.load_pack()
    file = Path(given) if given else checkpoint.ensure()
    tested, others = sampling.split(sampling.read_prompts(sampling.PROMPTS), PICTURES)
    model, clip, vae = sampling.load(file, dtype=torch.float16)  # on a CPU computed in float32
    demo: dict[str, Any] = sampling.DEMO
    encoded = [sampling.encode(clip, text) for text in tested]
    setting = sampling.Setting(
        tested, encoded, sampling.encode(clip, ""), int(demo["steps"]), float(demo["cfg"]), int(demo["size"]), vae
    )
    seconds: dict[str, float] = {}

    def timed(name: str, call: Any) -> Any:
        started = time.perf_counter()
        out = call()
        seconds[name] = round(time.perf_counter() - started, 3)
        return out

    pictures = {"float": timed("float", lambda: sampling.sample(model, setting))}
    conditionings = [sampling.encode(clip, text) for text in others[:CALIBRATION]]
    calibration = timed("calibrate", lambda: sampling.calibrate(pack, model, setting, conditionings))
    swap = sys.modules[f"{pack.__name__}.tfmq.host.quantize"]
    recipe = sys.modules[f"{pack.__name__}.tfmq.scheme"].PRESETS["W8A8"]
    quantized = timed("quantize", lambda: swap.quantize(model, calibration, recipe, lambda *_: None))
    pictures["ours"] = timed("ours", lambda: sampling.sample(quantized, setting))
    timed("ours again", lambda: sampling.sample(quantized, setting))
    timed("float again", lambda: sampling.sample(model, setting))
    return {**pictures, "about": {"seconds": seconds}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint")
    arguments = parser.parse_args()
    made = make(arguments.device, arguments.checkpoint)
    torch.save({name: made[name] for name in ("float", "ours")}, arguments.out)
    print(json.dumps(made["about"]), flush=True)


if __name__ == "__main__":
    main()
