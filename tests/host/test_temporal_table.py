"""Temporal layers without their weights: a curve made from a MODEL, saved in their place, and answering for them."""

import json
import logging
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open

from bench.temporal import cache as small
from support import loras, patchers

import comfy.hooks  # isort: skip
import comfy.model_detection  # isort: skip
import comfy.model_management  # isort: skip
import comfy.sample  # isort: skip
import comfy.supported_models  # isort: skip

cache = patchers.module("tfmq.host.temporal.cache")
model = patchers.module("tfmq.host.model")
quant = patchers.module("tfmq.host.temporal.quantize")
store = patchers.module("tfmq.host.store")
summary = patchers.module("tfmq.host.summary")
tables = patchers.module("tfmq.host.temporal.table")
saved_tables = patchers.module("tfmq.temporal.table")
LIMIT = 0.06  # measured 0.03: a change of the temporal features, however small, makes 8-bit layers round another way
SAMPLERS = ("euler", "heun", "dpmpp_2m_sde")
pytestmark = [pytest.mark.rounding, pytest.mark.usefixtures("folder")]


@pytest.fixture(scope="module")
def weights(quantized):
    return save(quantized)


@pytest.fixture(scope="module")
def saved(quantized):
    return save(quantized, tables.TABLE)


@pytest.fixture(scope="module")
def table(base):
    return make(base)


def make(patcher):
    with torch.inference_mode():
        return tables.make(patcher, patcher, model.time_axis(patcher), lambda done, total: None)


def save(patcher, temporal=tables.WEIGHTS, prefix="tfmq/table"):
    with torch.inference_mode():
        return Path(patchers.nodes.Save.execute(patcher, prefix, temporal).args[0])


def load(path):
    with torch.inference_mode():
        return patchers.nodes.Load.execute(f"tfmq/{path.name}").args


def read(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["tfmq"]), set(file.keys())


def shapes(table, *paths):
    return {path: torch.Size(table.layers[path].shape) for path in paths}


# --- The curve and the layers


def test_the_layers_answer_as_the_weights_do(base, table):
    from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

    network, t = base.model.diffusion_model, torch.tensor([0.0, 17.0, 500.0, 999.0])
    moment = saved_tables.Moment(table.curve)
    moment.set(t)
    x = torch.nn.functional.silu(network.time_embed(timestep_embedding(t, network.model_channels)))
    projections = [path for path in table.layers if "emb_layers" in path]
    assert projections
    for path in projections:
        leaf = tables.TableLinear(path, table.layers[path], table.curve.rows[path], moment)
        assert not list(leaf.parameters())
        assert patchers.distance(leaf(x), network.get_submodule(path)(x)) < 1e-3


def test_the_table_goes_through_a_file(table):
    tensors = {"other": torch.zeros(1), **table.tensors()}
    back = saved_tables.taken_from({saved_tables.MANIFEST: table.manifest()}, tensors)
    assert list(tensors) == ["other"] and back.layers == table.layers and back.nbytes_removed == table.nbytes_removed
    t = torch.tensor([3.25, 700.0])
    assert all(torch.equal(rows, back.curve.at(t)[path]) for path, rows in table.curve.at(t).items())
    with pytest.raises(patchers.TfmqError, match="damaged"):
        saved_tables.taken_from({saved_tables.MANIFEST: {}}, {})


def test_a_mixture_is_the_interpolation_of_the_curve(table):
    """The layers' own interpolation runs on the device of the call; `Curve.at` is what the error was measured by."""
    t = torch.tensor([-5.0, 0.0, 0.3, 17.5, 998.75, 999.0, 1200.0])  # the ends stand for what lies beyond them
    index, weights = saved_tables.mixture(t, table.curve.axis, table.curve.times.numel())
    at = table.curve.at(t.clamp(0, 999))
    for path, rows in table.curve.rows.items():
        assert patchers.distance((rows[index].float() * weights.unsqueeze(-1)).sum(1), at[path]) < 1e-5


@pytest.mark.parametrize("name", ["Qwen-Image", "AuraFlow", "Lumina2", "Z-Image", "Wan2.1", "PixArt-Sigma"])
def test_any_sampler_runs_on_a_table(name):
    base, other = small.patcher_of(name), small.patcher_of(name)
    table = make(base)
    assert 0 < table.curve.worst_error < 0.02
    tables.attach(other, table)
    for sampler in SAMPLERS:
        picture = small.sample(base, name, sampler, 3, batch=2)
        found = small.sample(other, name, sampler, 3, batch=2)
        assert 0 < patchers.distance(found, picture) < table.curve.worst_error


def test_references_at_timestep_zero_get_rows_of_their_own():
    network = small.patcher_of("Qwen-Image").model.diffusion_model
    table = make(small.patcher_of("Qwen-Image"))
    moment = saved_tables.Moment(table.curve)
    t = torch.tensor([0.7, 0.7])
    moment.set(torch.cat([t, t * 0]), more=True)
    path = "transformer_blocks.0.img_mod.1"
    leaf = tables.TableLinear(path, table.layers[path], table.curve.rows[path], moment)
    for times in (t, torch.cat([t, t * 0])):  # without and with the method that asks for them
        x = torch.nn.functional.silu(network.time_text_embed(times, torch.empty(0)))
        assert patchers.distance(leaf(x), network.get_submodule(path)(x)) < 0.01
    with pytest.raises(patchers.TfmqError, match="gets 3 rows"):
        leaf(torch.zeros(3, 32))


def test_the_graph_of_torch_compile_follows_the_timestep_and_is_not_made_again(table):
    moment, graphs = saved_tables.Moment(table.curve), []
    paths = [path for path in table.layers if "emb_layers" in path]
    leaves = [tables.TableLinear(path, table.layers[path], table.curve.rows[path], moment) for path in paths]
    x = torch.zeros(2, table.layers[paths[0]].shape[1])

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: [leaf(x) for leaf in leaves], backend=count, fullgraph=True)
    for t in (999.0, 3.25, 500.0):
        moment.set(torch.full((2,), t))
        for found, path in zip(compiled(x), paths, strict=True):
            assert patchers.distance(found[1], table.curve.at(torch.tensor([t]))[path][0]) < 1e-5
    assert len(graphs) == 1


# --- Files


def test_the_file_is_smaller_and_gives_nearly_the_same_picture(quantized, weights, saved):
    loaded, text = load(saved)
    reference = load(weights)[0]
    picture = patchers.sample(loaded, cfg=3.0)
    assert 0 < patchers.distance(picture, patchers.sample(reference, cfg=3.0)) < LIMIT
    about, keys = read(saved)
    table = about["temporal_table"]
    assert table["worst_error"] < 2e-3 and table["removed"] > 2 * table["bytes"]
    assert not [key for key in keys if key.startswith(("time_embed", *table["layers"]))]
    assert abs((weights.stat().st_size - saved.stat().st_size) - (table["removed"] / 2 - table["bytes"])) < 1e4
    before, after = quantized.attachments["tfmq"].bytes_after, loaded.attachments["tfmq"].bytes_after
    assert before - after == table["removed"] - table["bytes"]
    assert abs(reference.model_size() - loaded.model_size() - (before - after)) < 100
    assert f"5 layers, answered by a temporal table (worst error {table['worst_error']:.1e}" in text
    told = store.receipt(saved)
    assert str(saved) in told and "error over all t: worst" in told and store.receipt(weights) == str(weights)


def test_a_loaded_table_is_saved_again_as_it_is(saved):
    loaded = load(saved)[0]
    again = save(loaded, tables.WEIGHTS, "tfmq/again")
    assert again.stat().st_size < 1.001 * saved.stat().st_size
    assert read(again)[0]["bytes"] == read(saved)[0]["bytes"]
    assert torch.equal(patchers.sample(load(again)[0]), patchers.sample(loaded))


def test_a_lora_before_quantization_is_in_the_table(base, table):
    lora = loras.kohya(shapes(table, *table.layers), size=1.0)
    with_lora = loras.apply(base, lora, 1.0)
    quantized = patchers.quantize(with_lora, patchers.calibrate(with_lora))
    picture = patchers.sample(load(save(quantized, tables.TABLE))[0])
    assert patchers.distance(picture, patchers.sample(quantized)) < LIMIT
    assert patchers.distance(picture, patchers.sample(base)) > 0.2


def test_a_lora_behind_names_the_layers_that_are_gone(saved, table, caplog):
    loaded = load(saved)[0]
    plain = patchers.sample(loaded)
    gone = "input_blocks.1.0.emb_layers.1"
    there = "input_blocks.1.0.in_layers.2"
    lora = loras.kohya(shapes(table, gone) | {there: torch.Size([320, 320, 3, 3])})
    with_lora = loras.apply(loaded, lora, 1.0)
    with caplog.at_level(logging.WARNING):
        changed = patchers.sample(with_lora)
        patchers.sample(with_lora)
    said = [record.getMessage() for record in caplog.records if "saved as a temporal table" in record.getMessage()]
    assert len(said) == 1 and gone in said[0] and there not in said[0]
    alone = loras.apply(loaded, loras.kohya({there: torch.Size([320, 320, 3, 3])}, seed=1), 1.0)
    assert not torch.equal(changed, plain)  # the other layer follows its LoRA
    assert not torch.equal(patchers.sample(alone), plain)
    assert torch.equal(patchers.sample(loaded), plain)


def test_a_hooked_lora_on_a_layer_that_is_gone(saved, table, caplog):
    loaded = load(saved)[0]
    plain = patchers.sample(loaded)
    gone = "input_blocks.1.0.emb_layers.1"
    hooks = comfy.hooks.create_hook_lora(loras.kohya(shapes(table, gone)), 1.0, 0.0)
    with caplog.at_level(logging.WARNING):
        changed = patchers.sample(loaded, comfy.hooks.set_hooks_for_conditioning(patchers.conditioning(1), hooks))
    assert torch.equal(changed, plain)
    assert gone in caplog.text
    assert torch.equal(patchers.sample(loaded), plain)


def test_partial_loading(saved, monkeypatch):
    loaded = load(saved)[0]
    whole = patchers.sample(loaded)
    comfy.model_management.unload_all_models()
    patchers.only(3, monkeypatch)
    assert torch.equal(patchers.sample(loaded), whole)
    assert loaded.model.model_lowvram


def test_the_host_can_load_it_again_by_itself(saved):
    loaded = load(saved)[0]
    function, arguments = loaded.cached_patcher_init
    with torch.inference_mode():
        twin = function(*arguments, disable_dynamic=True)
    assert torch.equal(patchers.sample(twin), patchers.sample(loaded))


def test_a_model_that_the_host_tells_apart_by_shapes_of_layers_that_are_gone():
    """Qwen-Image, tiny; detection is replaced, for no tiny one would be recognised."""
    name = "Qwen-Image"
    base = small.patcher_of(name)
    latent = {"samples": torch.zeros(1, *small.MODELS_HERE[name].latent), "downscale_ratio_spacial": 8}
    positives = {"positive0": small.conditioning(name, 1)}
    quantized = patchers.quantize(base, patchers.calibrate(base, latent=latent, positives=positives))
    path = save(quantized, tables.TABLE, "tfmq/qwen")
    seen = []

    def detect(tensors, prefix, **_):
        seen.append({key: tuple(value.shape) for key, value in tensors.items()})
        known = small.MODELS_HERE[name]
        config = {**small.TINY[known.tiny].config, **known.config}
        found = comfy.supported_models.QwenImage(config)
        found.unet_config.update(config)
        return found

    with patch.object(comfy.model_detection, "model_config_from_unet", detect):
        loaded = load(path)[0]
    assert seen[0]["transformer_blocks.1.txt_mod.1.weight"] == (6 * 32, 32)
    for sampler in SAMPLERS:
        reference = small.sample(quantized, name, sampler, 3)
        assert 0 < patchers.distance(small.sample(loaded, name, sampler, 3), reference) < LIMIT


# --- Bad input


def refused(patcher, text):
    with pytest.raises(patchers.TfmqError, match=text) as failure:
        make(patcher)
    message = str(failure.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 400


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SDXL", "depend on more than the timestep"),
        ("Flux", "depend on more than the timestep"),
        ("SD3", "depend on more than the timestep"),
        ("Wan2.2-5B", "timestep per token"),
    ],
)
def test_what_depends_on_more_keeps_its_weights(name, text):
    refused(small.patcher_of(name), text)


def test_integer_temporal_layers_keep_their_weights(base, calibration, folder):
    with patch.object(patchers.module("tfmq.temporal.tiar"), "DAMPINGS", (1e-2,)):
        quantized = patchers.quantize(base, calibration, temporal=quant.INT8)
    files = set(folder.rglob("*"))
    with pytest.raises(patchers.TfmqError, match=r"time_embed\.0 is quantized already"):
        save(quantized, tables.TABLE)
    assert set(folder.rglob("*")) == files


def test_nothing_is_left_for_the_temporal_cache(saved):
    with pytest.raises(patchers.TfmqError, match="answer from a saved table already"):
        cache.apply(load(saved)[0], 10**9)


def test_features_that_are_nan_are_no_table():
    broken = small.patcher_of("AuraFlow")
    broken.model.diffusion_model.modF[1].weight.data[3, 4] = float("nan")
    refused(broken, "modF[.]1 gives NaN")


def test_a_run_that_the_table_cannot_follow_is_told_so():
    other = small.patcher_of("Lumina2")
    tables.attach(other, make(other))
    wrapper = other.wrappers["apply_model"][tables.NAME][0]
    with pytest.raises(patchers.TfmqError, match="timestep of their own"):
        wrapper._refuse({}, {"ref_latents": [torch.zeros(1, 16, 8, 8)]})
    with pytest.raises(patchers.TfmqError, match="emb_patch"):
        wrapper._refuse({"patches": {"emb_patch": [None]}}, {})


def test_a_file_that_lacks_rows_is_damaged(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    with safe_open(saved, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(saved)
    del tensors[next(key for key in tensors if key.startswith(f"{saved_tables.KEYS}rows:"))]
    save_file(tensors, tmp_path / "cut.safetensors", metadata=header)
    with pytest.raises(patchers.TfmqError, match="damaged"):
        store.load(str(tmp_path / "cut.safetensors"))
