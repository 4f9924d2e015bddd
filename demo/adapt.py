"""The shipped example workflows with the settings of the demo checkpoint in their widgets."""

from __future__ import annotations

import copy
from typing import Any

from devkit.workflow import Workflow, set_widget

SIZE = 64  # pixels, what the demo model was trained on
SAMPLING = {"steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}


def for_demo(
    workflow: Workflow, object_info: dict[str, Any], checkpoint: str, prompt: str, calibration_prompts: list[str]
) -> Workflow:
    """A copy of an example workflow that runs on the demo checkpoint; all else is as shipped."""
    wanted: dict[str, dict[str, Any]] = {
        "CheckpointLoaderSimple": {"ckpt_name": checkpoint},
        "EmptyLatentImage": {"width": SIZE, "height": SIZE},
        "KSampler": SAMPLING,
        "TFMQ_Calibrate": {**SAMPLING, "prompts": "\n".join(calibration_prompts)},
    }
    texts = {"Prompt": prompt, "Negative prompt": ""}
    adapted = copy.deepcopy(workflow)
    for node in adapted["nodes"]:
        values = wanted.get(node["type"], {})
        if node["type"] == "CLIPTextEncode":
            values = {"text": texts[node["title"]]}
        for name, value in values.items():
            set_widget(node, object_info[node["type"]], name, value)
    return adapted
