"""Four-bit weights on the host: packed in memory and in the file, near the float model, LoRA beside them."""

import copy

import pytest
import torch

from support import loras, patchers

import comfy.lora  # isort: skip
import comfy.utils  # isort: skip

pytestmark = pytest.mark.rounding

store = patchers.module("tfmq.host.store")
RECIPES = ("W4A8", "W4A16")


@pytest.fixture(scope="module", params=RECIPES)
def quantized(base, calibration, request):
    return patchers.quantize(base, calibration, request.param)


def fours(patcher):
    return {path: leaf for path, leaf in patchers.leaves(patcher).items() if leaf.scheme.weight_bits == 4}


def test_four_bits_are_near_and_eight_nearer(base, calibration, quantized):
    reference = patchers.sample(base)
    four = patchers.distance(patchers.sample(quantized), reference)
    eight = patchers.distance(patchers.sample(patchers.quantize(base, calibration)), reference)
    assert eight < four < 0.2
    assert {leaf.geometry.is_conv for leaf in fours(quantized).values()} == {True, False}


def test_what_stays_in_memory_is_the_packed_size(quantized):
    patchers.sample(quantized)
    plan = quantized.attachments["tfmq"].plan
    assert len(fours(quantized)) >= 20
    for path, leaf in fours(quantized).items():
        entries = leaf.weight.numel()
        weight = leaf.weight
        assert weight._qdata.nbytes == entries // 2
        parts = weight.layout_cls.state_dict_tensors
        held = sum(part.nbytes for part in parts(weight._qdata, weight._params).values())
        groups = entries // plan.layers[path].group
        assert held <= entries // 2 + 2 * groups + 4 * (weight.shape[0] + weight.shape[1])
        # Nothing else that a run leaves on the leaf is as large as the weight.
        kept = [v for v in vars(leaf).values() if isinstance(v, torch.Tensor)]
        assert leaf._prepared is None and all(v.nbytes < entries // 2 for v in kept)


def test_the_file_gives_the_same_picture(base, quantized):
    with torch.inference_mode():
        path = store.save(quantized, "tfmq/four")
    eight = sum(leaf.weight.numel() for leaf in fours(quantized).values())
    rest = sum(p.numel() for p in base.model.diffusion_model.parameters()) - eight
    assert path.stat().st_size < 0.31 * 2 * eight + 2 * rest + 2_000_000
    with torch.inference_mode():
        loaded = store.load(str(path))
    assert loaded.attachments["tfmq"].plan == quantized.attachments["tfmq"].plan
    assert torch.equal(patchers.sample(loaded), patchers.sample(quantized))


def test_a_lora_comes_and_goes(quantized, tmp_path):
    found = fours(quantized)
    shapes = {path: leaf.weight.shape for path, leaf in found.items()}
    lora = comfy.utils.load_torch_file(str(loras.write(loras.kohya(shapes), tmp_path / "lora.safetensors")))
    before = {path: leaf.weight._qdata.clone() for path, leaf in found.items()}
    plain = patchers.sample(quantized)
    with_lora = loras.apply(quantized, lora, 1.0)
    changed = patchers.sample(with_lora)
    assert patchers.distance(changed, plain) > 1e-3
    assert all(torch.equal(leaf.weight._qdata, before[path]) for path, leaf in found.items())
    assert torch.equal(patchers.sample(quantized), plain)


@pytest.mark.parametrize("recipe", ["W4A8", "smallest at a quality"])
def test_a_lora_before_it_is_merged_once(base, recipe):
    """Rounding and measuring load the model, patches merged; the weight that is rounded must not get them again."""
    ends = "attn1.to_q.weight"
    keys = {key: weight for key, weight in patchers.weights(base).items() if key.endswith(ends)}
    found = {key.removeprefix("diffusion_model.").removesuffix(".weight"): weight for key, weight in keys.items()}
    patched = loras.apply(base, loras.kohya({path: weight.shape for path, weight in found.items()}, size=1.0), 1.0)
    quantized = patchers.quantize(patched, patchers.calibrate(patched, 4), recipe, effort="fast", quality_db=12.0)
    assert found
    for path, weight in found.items():
        key = f"diffusion_model.{path}.weight"
        merged = comfy.lora.calculate_weight(patched.patches[key], weight.float().clone(), key)
        assert patchers.distance(weight, merged) > 0.5
        leaf = patchers.leaves(quantized)[path]
        assert leaf.scheme.weight_bits == 4
        assert patchers.distance(leaf.weight.dequantize(), merged) < 0.2


def test_a_copy_is_its_own(quantized):
    leaf = next(iter(fours(quantized).values()))
    twin = copy.deepcopy(leaf)
    assert torch.equal(twin.weight.dequantize(), leaf.weight.dequantize())
    assert twin.weight._qdata.data_ptr() != leaf.weight._qdata.data_ptr()
