"""The example workflows in the front end: they load without a complaint, and run from the browser."""

import pytest

from browser.front_end import FrontEnd
from demo import checkpoint
from devkit import workflow
from devkit.paths import WORKFLOWS

NAMES = ("quantize_sd15", "load_sd15")
SAMPLING = {"steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}
PROMPTS = "a large red circle on a white background\na small blue star on a black background"


@pytest.mark.parametrize("name", NAMES)
def test_an_example_loads_without_a_complaint(page: FrontEnd, name: str):
    page.drop(name, workflow.load(WORKFLOWS / f"{name}.json"))
    page.page.wait_for_timeout(1500)  # what is wrong is reported a moment later
    assert page.missing() == []
    assert page.complaints() == []
    assert page.dialogs() == []


@pytest.mark.parametrize("name", NAMES)
def test_the_front_end_keeps_every_widget_of_an_example(page: FrontEnd, name: str):
    shipped = workflow.load(WORKFLOWS / f"{name}.json")
    info = page.server.client.object_info()
    page.drop(name, shipped)
    for node_type in {node["type"] for node in shipped["nodes"]} & set(info):
        expected = [dict(workflow.widgets(n, info[node_type])) for n in shipped["nodes"] if n["type"] == node_type]
        shown = page.widgets(node_type)
        for want, have in zip(expected, shown, strict=True):
            assert {key: have.get(key) for key in want} == want, node_type


def test_a_node_that_nobody_has_is_noticed(own_page: FrontEnd):
    broken = workflow.load(WORKFLOWS / "load_sd15.json")
    broken["nodes"][0]["type"] = "TFMQ_NobodyHasThis"
    own_page.drop("broken", broken)
    assert own_page.missing() == ["TFMQ_NobodyHasThis"]


def test_both_examples_run_from_the_browser(page: FrontEnd):
    name = checkpoint.ensure().name
    page.drop("quantize_sd15", workflow.load(WORKFLOWS / "quantize_sd15.json"))
    page.set("CheckpointLoaderSimple", ckpt_name=name)
    page.set("EmptyLatentImage", width=64, height=64)
    page.set("KSampler", **SAMPLING)
    page.set("TFMQ_Calibrate", **SAMPLING, prompts=PROMPTS)
    page.run()
    assert page.pictures("SaveImage") == [[64, 64]] * 2
    (width, height), *more = page.pictures("TFMQ_Compare")
    assert width >= 3 * 64 and height >= 64 and not more, "float, int8 and their difference side by side"

    page.refresh()
    page.drop("load_sd15", workflow.load(WORKFLOWS / "load_sd15.json"))
    page.set("CheckpointLoaderSimple", ckpt_name=name)
    page.set("EmptyLatentImage", width=64, height=64)
    page.set("KSampler", **SAMPLING)
    page.run()  # the file's name is as shipped: what the other example saves first
    assert page.pictures("SaveImage") == [[64, 64]]
    assert page.complaints() == []
