"""TFMQ Save and TFMQ Load: the same pictures from the file, and a stock host that stops at it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from support import loras, patchers, tiny

import comfy.model_management  # isort: skip
import comfy.sd  # isort: skip
from comfy.quant_ops import QuantizedTensor  # isort: skip

store = patchers.module("tfmq.host.store")
layout = patchers.module("tfmq.host.leaf.layout")
swap = patchers.module("tfmq.host.quantize")
summary = patchers.module("tfmq.host.summary")
pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture(scope="module")
def saved(quantized):
    return save(quantized)


def save(patcher, prefix="tfmq/model"):
    with torch.inference_mode():
        return Path(patchers.nodes.Save.execute(patcher, prefix).args[0])


def load(path):
    with torch.inference_mode():
        return patchers.nodes.Load.execute(f"tfmq/{path.name}").args


def shapes(patcher, *ends):
    """Shapes of the layers of the network whose path ends so."""
    found = {path: m.weight.shape for path, m in patcher.model.diffusion_model.named_modules() if path.endswith(ends)}
    assert found
    return found


def test_the_file_gives_the_same_picture(quantized, saved):
    loaded, text = load(saved)
    assert torch.equal(patchers.sample(loaded), patchers.sample(quantized))
    assert text == summary.text(quantized.attachments["tfmq"])
    again = load(saved)[0]
    assert torch.equal(patchers.sample(again), patchers.sample(loaded))


@pytest.mark.parametrize("recipe", ["W8A8", "W4A8"])
def test_a_leaf_gives_back_what_it_was_made_of(base, calibration, recipe, monkeypatch):
    made, make = [], swap.make_leaf

    def spy(module, state, *rest):
        if len(made) % 2:  # the tiny model needs none
            state = dataclasses.replace(state, balance=torch.rand(state.shape[1]) + 0.5)
        made.append((state, make(module, state, *rest)))
        return made[-1][1]

    monkeypatch.setattr(swap, "make_leaf", spy)
    patchers.quantize(base, calibration, recipe)
    assert {state.balance is None for state, _ in made} == {True, False}
    for state, leaf in made:
        found = layout.state_of(leaf)
        assert (found.kind, found.scheme, found.shape) == (state.kind, state.scheme, state.shape)
        parts, wanted = found.tensors(), state.tensors()
        assert parts.keys() == wanted.keys()
        assert all(torch.equal(parts[name], tensor) for name, tensor in wanted.items())


def test_the_loaded_model_is_as_small_as_the_file(quantized, saved):
    loaded = load(saved)[0]
    before, after = patchers.leaves(quantized), patchers.leaves(loaded)
    assert before.keys() == after.keys()
    for path, leaf in after.items():
        assert type(leaf) is type(before[path]) and leaf.scheme == before[path].scheme
        assert torch.equal(leaf.weight._qdata, before[path].weight._qdata)
        assert isinstance(leaf.weight, QuantizedTensor) and leaf.weight.dtype == before[path].weight.dtype
    # The rest is kept in 16 bits in the file and in the model's own type in memory.
    assert saved.stat().st_size < loaded.model_size() * 1.1
    assert loaded.model_size() == comfy.model_management.module_size(loaded.model)
    assert abs(loaded.model_size() - quantized.model_size()) < 0.01 * quantized.model_size()
    assert all(key.endswith(".forward") for key in loaded.object_patches)  # the leaves are the model's own


@pytest.mark.parametrize("kind", [tiny.SD15, tiny.FLUX, tiny.WAN], ids=lambda kind: kind.name)
def test_what_the_host_read_from_the_header_of_the_original_is_kept(kind):
    header = json.loads(kind.metadata["config"])["transformer"] if kind.metadata else {}
    assert store._from_header(patchers.load(kind)) == header  # all else it finds by the weights


def test_the_saved_file_gives_the_host_that_header():
    patcher, text, start = patchers.load(tiny.WAN), patchers.conditioning(1, tiny.WAN), torch.zeros(1, 16, 1, 8, 8)
    inputs = {"positives": {"positive0": text}, "latent": {"samples": start}, "scheduler": "simple"}
    quantized = patchers.quantize(patcher, patchers.calibrate(patcher, **inputs))
    loaded = load(save(quantized, "tfmq/wan"))[0]
    assert torch.equal(patchers.sample(loaded, text, start=start), patchers.sample(quantized, text, start=start))
    assert store._from_header(loaded) == store._from_header(patcher) != {}


def test_the_file_says_what_it_is(quantized, saved):
    with safe_open(saved, framework="pt") as file:
        manifest = json.loads(file.metadata()["tfmq"])
        keys = set(file.keys())
    assert (manifest["kind"], manifest["sampling"]) == ("model", "EPS+ModelSamplingDiscrete")
    assert manifest["plan"]["layers"].keys() == patchers.leaves(quantized).keys()
    for path, leaf in patchers.leaves(quantized).items():
        assert {f"{path}.weight", f"{path}.weight_scale"} <= keys
        # A stock host takes codes for weights where a convolution carries this key.
        assert (f"{path}.comfy_quant" in keys) == (not leaf.geometry.is_conv)
    assert not [key for key in keys if key.endswith(".scale")]  # some loaders of the host rename these
    assert "tfmq/model_00001_.safetensors" in store.saved_models()


def test_a_host_without_this_pack_stops_at_the_file(saved):
    with pytest.raises(Exception) as failure:
        comfy.sd.load_diffusion_model(str(saved))
    assert "tfmq" in str(failure.value)


def test_saving_again_makes_another_file(quantized, saved):
    second = save(quantized)
    assert second != saved and second.read_bytes()[-1000:] == saved.read_bytes()[-1000:]
    second.unlink()


def test_a_lora_behind_quantization_is_not_in_the_file(quantized, saved):
    plain = patchers.sample(quantized)
    lora = loras.kohya(shapes(quantized, "attn1.to_q", "emb_layers.1", "in_layers.2"))
    with_lora = loras.apply(quantized, lora, 1.0)
    assert not torch.equal(patchers.sample(with_lora), plain)
    path = save(with_lora, "tfmq/without")
    assert torch.equal(patchers.sample(load(path)[0]), plain)
    assert torch.equal(patchers.sample(quantized), plain)


def test_a_lora_before_quantization_is_in_the_file(base):
    lora = loras.kohya(shapes(base, "attn1.to_q", "emb_layers.1", "in_layers.2", "input_blocks.0.0", "time_embed.0"))
    patched = loras.apply(base, lora, 0.7)
    quantized = patchers.quantize(patched, patchers.calibrate(patched))
    picture, floats = patchers.sample(quantized), patchers.sample(base)
    loaded = load(save(quantized, "tfmq/baked"))[0]
    # In memory the host merges into layers that stay in float as it does for any model.
    assert torch.equal(patchers.sample(loaded), picture)
    assert torch.equal(patchers.sample(base), floats)


def test_a_lora_on_a_loaded_model(quantized, saved):
    loaded = load(saved)[0]
    plain = patchers.sample(loaded)
    lora = loras.kohya(shapes(quantized, "attn1.to_q", "attn2.to_out.0", "in_layers.2", "emb_layers.1"))
    assert torch.equal(
        patchers.sample(loras.apply(loaded, lora, 0.8)), patchers.sample(loras.apply(quantized, lora, 0.8))
    )
    assert torch.equal(patchers.sample(loaded), plain)


def test_partial_loading_of_a_loaded_model(saved, monkeypatch):
    loaded = load(saved)[0]
    whole = patchers.sample(loaded)
    comfy.model_management.unload_all_models()
    patchers.only(6, monkeypatch)
    assert torch.equal(patchers.sample(loaded), whole)
    assert loaded.model.model_lowvram


def test_a_loaded_model_is_quantized_already(saved):
    loaded = load(saved)[0]
    with pytest.raises(patchers.TfmqError, match="already quantized by TFMQ"):
        patchers.calibrate(loaded)
    again = save(loaded, "tfmq/again")
    assert torch.equal(patchers.sample(load(again)[0]), patchers.sample(loaded))


def test_the_host_can_load_it_again_by_itself(saved):
    """It does so for a clone on another device or without dynamic loading."""
    loaded = load(saved)[0]
    function, arguments = loaded.cached_patcher_init
    with torch.inference_mode():
        twin = function(*arguments, disable_dynamic=True)
    assert twin.model is not loaded.model
    assert torch.equal(patchers.sample(twin), patchers.sample(loaded))


def test_a_clone_onto_a_network_of_its_own(quantized, saved):
    """As the host makes one for torch.compile behind dynamic loading, for hooked LoRAs and for other devices."""
    for source in (quantized, load(saved)[0]):
        with torch.inference_mode():
            fresh = load(saved)[0]
            clone = source.clone(model_override=(fresh.model, ({}, {}, {}, set())))
        ours = set(clone.model.diffusion_model.modules())
        patches = [patch for key, patch in clone.object_patches.items() if key.endswith(".forward")]
        bound = [cell.cell_contents for patch in patches for cell in patch.__closure__ or ()]
        assert patches and all(module in ours for module in bound if isinstance(module, nn.Module))
        assert torch.equal(patchers.sample(clone), patchers.sample(source))
        clock = clone.attachments["tfmq"].clock
        inside = [m for m in clone.model.diffusion_model.modules() if hasattr(m, "clock")]
        assert inside and all(module.clock is clock for module in inside)


class NotForTwo:
    def __deepcopy__(self, memo):
        raise AssertionError("it would be freed twice")


def test_a_clone_for_another_gpu_has_leaves_of_its_own(quantized, saved):
    """It runs at the same time, in another thread; tables and weights of one leaf cannot be in two places."""
    for source in (quantized, load(saved)[0]):
        source = source.clone()
        if source.cached_patcher_init is None:
            source.cached_patcher_init = patchers.load, ()
        streamed = next(iter(patchers.leaves(source).values()))
        streamed._v = NotForTwo()  # memory of this GPU, which dynamic loading hangs on a leaf
        with torch.inference_mode():
            clone = source.deepclone_multigpu(new_load_device=torch.device("cpu"))
            again = source.clone(model_override=clone.get_clone_model_override())  # as the host does before each run
        del streamed._v
        ours, theirs, later = (patchers.leaves(one) for one in (source, clone, again))
        assert not any(hasattr(leaf, "_v") for leaf in theirs.values())
        assert ours.keys() == theirs.keys() and not {*ours.values()} & {*theirs.values()}
        assert all(later[path] is leaf for path, leaf in theirs.items())
        assert all(leaf.clock is ours[path].clock for path, leaf in theirs.items())
        picture = patchers.sample(source)
        assert torch.equal(patchers.sample(clone), picture) and torch.equal(patchers.sample(again), picture)


def test_v_prediction_is_kept_or_announced(base):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    other = ModelSamplingDiscrete().patch(base, "v_prediction", False)[0]
    quantized = patchers.quantize(other, patchers.calibrate(other))
    loaded, text = load(save(quantized, "tfmq/v"))
    assert "calibrated with" in text and "V_PREDICTION" in text
    again = ModelSamplingDiscrete().patch(loaded, "v_prediction", False)[0]
    assert torch.equal(patchers.sample(again), patchers.sample(quantized))


@pytest.mark.parametrize("recipe", ["W8A8 Linear only"])
def test_other_recipes(base, recipe):
    quantized = patchers.quantize(base, patchers.calibrate(base), recipe)
    assert not any(leaf.geometry.is_conv for leaf in patchers.leaves(quantized).values())
    loaded = load(save(quantized, "tfmq/linear"))[0]
    assert torch.equal(patchers.sample(loaded), patchers.sample(quantized))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_computes_in_16_bits(dtype):
    half = patchers.load(tiny.FLUX, dtype=dtype)
    inputs = {"positives": {"positive0": patchers.conditioning(1, tiny.FLUX)}, "scheduler": "simple"}
    start = torch.zeros(1, 16, 8, 8)
    handle = patchers.calibrate(half, latent={"samples": start, "downscale_ratio_spacial": 8}, **inputs)
    quantized = patchers.quantize(half, handle)
    positive = patchers.conditioning(1, tiny.FLUX)
    picture = patchers.sample(quantized, positive, start=start)
    assert patchers.distance(picture, patchers.sample(half, positive, start=start)) < 0.05
    assert quantized.model.diffusion_model.img_in.weight.dtype is dtype
    # The loader takes the type that the host thinks best for the machine, as for any other checkpoint.
    loaded = load(save(quantized, f"tfmq/half-{dtype}"))[0]
    assert loaded.model.diffusion_model.img_in.weight.dtype is torch.float32
    assert patchers.distance(patchers.sample(loaded, positive, start=start), picture) < 0.05
