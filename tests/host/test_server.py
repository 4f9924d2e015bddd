"""The host starts with the pack in it, and runs what the tests rely on."""

import pytest

from devkit import workflow
from devkit.client import Client, HostError
from devkit.host import Server
from devkit.paths import WORKFLOWS
from support import tiny

NODES = {"TFMQ_Calibrate", "TFMQ_CalibrateCustom", "TFMQ_Quantize", "TFMQ_Save", "TFMQ_Load", "TFMQ_Compare"}
# Inputs that name a file of the person's own.
FILES = {"ckpt_name", "model_name"}


def test_the_host_lists_every_node_of_the_pack(client: Client, server: Server):
    found = {name for name in client.object_info() if name.startswith("TFMQ_")}
    assert found >= NODES, server.log_tail()


def test_the_pack_is_imported_without_complaint(server: Server):
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert "IMPORT FAILED" not in log
    assert "ComfyUI-TFMQ" in log


@pytest.mark.parametrize("name", ["quantize_sd15", "load_sd15"])
def test_example_workflows_fit_the_host(client: Client, name: str):
    nodes = client.object_info()
    prompt = workflow.to_prompt(workflow.load(WORKFLOWS / f"{name}.json"), nodes)
    for key, node in prompt.items():
        required = nodes[node["class_type"]]["input"].get("required", {})
        missing = set(required) - set(node["inputs"])
        assert not missing, f"node {key} ({node['class_type']}) lacks {missing}"
        known = set(required) | set(nodes[node["class_type"]]["input"].get("optional", {}))
        assert {name.split(".")[0] for name in node["inputs"]} <= known


@pytest.mark.parametrize("name", ["quantize_sd15", "load_sd15"])
def test_choices_in_the_example_workflows_are_choices_of_the_host(client: Client, name: str):
    """The front end saves widgets by place: a new one in front of others would shift every saved workflow."""
    nodes = client.object_info()
    prompt = workflow.to_prompt(workflow.load(WORKFLOWS / f"{name}.json"), nodes)
    for key, node in prompt.items():
        groups = nodes[node["class_type"]]["input"]
        for input_name, spec in {**groups.get("required", {}), **groups.get("optional", {})}.items():
            choices = spec[0] if isinstance(spec[0], list) else spec[1].get("options") if spec[0] == "COMBO" else None
            if choices is not None and input_name in node["inputs"] and input_name not in FILES:
                assert node["inputs"][input_name] in choices, f"node {key} ({node['class_type']}): {input_name}"


@pytest.mark.parametrize("model", tiny.ALL, ids=lambda model: model.name)
def test_tiny_models_load_and_sample(client: Client, model: tiny.Tiny):
    result = client.queue(sampling(model, steps=2))
    assert result.outputs["6"]["latents"], "no latent came out"


def test_a_failing_node_is_named(client: Client):
    prompt = sampling(tiny.FLUX, steps=2)
    prompt["2"] = tiny.SDXL.conditioning(seed=1)
    with pytest.raises(HostError) as failure:
        client.queue(prompt)
    assert (failure.value.node_id, failure.value.node_type) == ("5", "KSampler")


def test_a_refused_graph_names_the_input(client: Client):
    prompt = sampling(tiny.FLUX, steps=2)
    prompt["5"]["inputs"]["sampler_name"] = "no such sampler"
    with pytest.raises(HostError, match="sampler_name"):
        client.queue(prompt)


def sampling(model: tiny.Tiny, steps: int) -> workflow.Prompt:
    """Load, sample, save the latent: the shortest graph that runs a model."""
    settings = {"seed": 3, "steps": steps, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    return {
        "1": model.loader,
        "2": model.conditioning(seed=1),
        "3": model.conditioning(seed=2),
        "4": model.empty_latent,
        "5": {"class_type": "KSampler", "inputs": {**settings, **links}},
        "6": {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": f"test/{model.name}"}},
    }
