"""What version 0.1 saved still loads, to the bit, and what its graphs ask of the nodes is still there.

tests/data/v0.1 was made by that version from the tiny checkpoints with two of a hundred weights left (`thin`): saved
models (packed weights of 8 and 4 bits, a temporal table, temporal layers in 8 bits), calibrations, and in about.json
digests of what it held and the inputs of its nodes.
"""

import asyncio
import hashlib
import json
import lzma

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from devkit.paths import ROOT
from support import patchers, tiny

import comfy.sd  # isort: skip

store = patchers.module("tfmq.host.store")

DATA = ROOT / "tests" / "data" / "v0.1"
ABOUT = json.loads((DATA / "about.json").read_text(encoding="utf-8"))
MODELS = {"wan-table": tiny.WAN, "sd3-plain": tiny.SD3, "sd15-int8": tiny.SD15}
LATENTS = {"wan": (1, 16, 1, 8, 8), "sd3": (1, 16, 8, 8), "sd15": (1, 4, 8, 8)}


def thin(model, folder):
    """The MODEL of a tiny checkpoint with two of a hundred weights left, so that what is made of it packs well."""
    with safe_open(model.path, "pt") as file:
        about = file.metadata()
        tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    for n, (key, value) in enumerate(tensors.items()):
        if value.dim() in (2, 4):
            left = torch.rand(value.shape, generator=torch.Generator().manual_seed(n)) < 0.02
            tensors[key] = torch.where(left, 7 * value, torch.zeros_like(value)).contiguous()
    path = folder / f"thin-{model.name}.safetensors"
    save_file(tensors, path, about)
    if model.kind == "diffusion_models":
        return comfy.sd.load_diffusion_model(str(path))
    return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]


def unpack(name, folder):
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name.removesuffix(".xz").removeprefix("calibration-")
    target.write_bytes(lzma.decompress((DATA / name).read_bytes()))
    return target


def picture(patcher, model):
    return patchers.sample(patcher, patchers.conditioning(1, model), start=torch.zeros(LATENTS[model.name]))


def digest(leaf):
    """Of the codes, all that belongs to them, and the activation tables."""
    found, weight, tables = hashlib.sha256(), leaf.weight, leaf.tables.tensors
    parts = [weight._qdata, *(getattr(weight._params, name) for name in weight._params._tensor_fields())]
    for tensor in (*parts, *(tables[name] for name in sorted(tables))):
        found.update(bytes(memoryview(tensor.contiguous().view(torch.uint8).numpy().reshape(-1))))
    return found.hexdigest()[:16]


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_as_it_was(name, tmp_path):
    loaded = store.load(str(unpack(f"{name}.safetensors.xz", tmp_path)))
    assert {path: digest(leaf) for path, leaf in patchers.leaves(loaded).items()} == ABOUT["layers"][name]
    model = MODELS[name]
    found = patchers.distance(picture(loaded, model), picture(thin(model, tmp_path), model))
    # One picture: the distance itself moves with every code at a tie.
    assert 0.5 * ABOUT["distance"][name] < found < 2 * ABOUT["distance"][name]


@pytest.mark.parametrize("model", [tiny.WAN, tiny.SD3], ids=lambda m: m.name)
def test_a_calibration_is_found_and_fits(model, tmp_path, monkeypatch):
    """Nothing runs: the request has the same key, and the file is read."""
    base = thin(model, tmp_path)
    kept = [unpack(p.name, tmp_path) for p in DATA.glob("calibration-*.xz")]
    with patchers.files_in(tmp_path / "files") as _, torch.inference_mode():
        folder = tmp_path / "files" / "tfmq_calibrations"
        for path in kept:
            path.rename(folder / path.name)
        before = set(folder.iterdir())
        latent = {"samples": torch.zeros(LATENTS[model.name]), "downscale_ratio_spacial": 8}
        monkeypatch.setattr("comfy.sample.sample", lambda *_, **__: pytest.fail("it sampled"))
        handle = patchers.nodes.Calibrate.execute(
            base, latent=latent, seed=0, steps=3, cfg=1.0, sampler_name="euler", scheduler="normal",
            positives={f"positive{i}": patchers.conditioning(i, model) for i in range(2)}, intervals=2,
        ).args[0]  # fmt: skip
        assert set(folder.iterdir()) == before
        assert patchers.quantize(base, handle).attachments["tfmq"].plan.layers


def test_the_nodes_take_what_they_took():
    """A graph names nodes, inputs and types, and counts outputs."""
    extension = asyncio.run(patchers.nodes.comfy_entrypoint())
    now = {}
    for node in asyncio.run(extension.get_node_list()):
        about = node.GET_NODE_INFO_V1()
        kinds = {
            n: t[0] if isinstance(t[0], str) else "COMBO" for part in about["input"].values() for n, t in part.items()
        }
        now[about["name"]] = kinds, [t if isinstance(t, str) else "COMBO" for t in about["output"]]
    for name, before in ABOUT["nodes"].items():
        kinds, outputs = now[name]
        asked = {n: t for part in before["input"].values() for n, t in part.items()}
        assert asked.items() <= kinds.items(), name
        assert outputs[: len(before["output"])] == before["output"], name
