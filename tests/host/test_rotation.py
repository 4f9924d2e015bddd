"""Rotated layers on the host: static and per token, with and without permutations, in memory and in the file."""

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from support import loras, patchers

import comfy.utils  # isort: skip

pytestmark = pytest.mark.rounding

store = patchers.module("tfmq.host.store")
swap = patchers.module("tfmq.host.quantize")
candidates = patchers.module("tfmq.decide.candidates")
scheme = patchers.module("tfmq.scheme")


@pytest.fixture(scope="module")
def calibration(base):
    """Two of three Linears get random permutations, so that all kinds are there."""
    found = patchers.calibrate(base).load()
    layers = dict(found.layers)
    for place, path in enumerate([path for path, s in layers.items() if s.rotated is not None]):
        generator, channels = torch.Generator().manual_seed(place), layers[path].shape[1]
        p = [torch.randperm(channels, generator=generator) for _ in range(place % 3)]
        permutations = torch.stack(p).to(torch.int16) if p else None
        layers[path] = dataclasses.replace(layers[path], permutations=permutations)
    return dataclasses.replace(found, layers=layers)


@pytest.fixture(scope="module", params=[(8, "static"), (8, "dynamic"), (4, "dynamic")], ids=str)
def rotated(base, calibration, request):
    bits, activations = request.param
    recipe = scheme.Recipe("r", weight_bits=bits, convolutions=False, activations=activations)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        kind = candidates._kind
        patch.setattr(
            candidates, "_kind", lambda *about: (kind(*about)[0], 0.0, "")
        )  # no error: every Linear is rotated
        patch.setattr(candidates, "WEIGHT_SHARE", 0.0)
        return swap.quantize(base, calibration, recipe, lambda *_: None)


def kinds(patcher):
    return {
        (leaf.scheme.rotation > 0, 0 if leaf.permutations is None else len(leaf.permutations))
        for leaf in patchers.leaves(patcher).values()
    }


def test_all_kinds_are_near_the_float_layer(base, rotated):
    assert {(True, 0), (True, 1), (True, 2)} <= kinds(rotated)
    for path, leaf in patchers.leaves(rotated).items():
        weight = base.get_model_object(f"diffusion_model.{path}.weight").float()
        limit = 0.12 if leaf.scheme.weight_bits == 4 else 0.012
        assert float((leaf.weight.dequantize().float() - weight).norm() / weight.norm()) < limit, path


def test_the_file_gives_the_same_picture(rotated):
    with torch.inference_mode():
        loaded = store.load(str(store.save(rotated, "tfmq/rotated")))
    assert loaded.attachments["tfmq"].plan == rotated.attachments["tfmq"].plan
    before, after = patchers.leaves(rotated), patchers.leaves(loaded)
    for path, leaf in after.items():
        mine, its = leaf.permutations, before[path].permutations
        assert (mine is None) == (its is None) and (mine is None or torch.equal(mine, its))
        assert torch.equal(leaf.weight.dequantize(), before[path].weight.dequantize())
    assert torch.equal(patchers.sample(loaded), patchers.sample(rotated))


def test_a_lora_meets_the_input_that_is_not_rotated(rotated, tmp_path):
    found = {p: leaf for p, leaf in patchers.leaves(rotated).items() if leaf.permutations is not None}
    shapes = {path: leaf.weight.shape for path, leaf in found.items()}
    lora = comfy.utils.load_torch_file(str(loras.write(loras.kohya(shapes), tmp_path / "lora.safetensors")))
    with_lora = loras.apply(rotated, lora, 1.0)
    patchers.sample(with_lora)  # loads it
    for path, leaf in list(patchers.leaves(with_lora).items()):
        if path in found and leaf.residuals:
            x = torch.randn(2, 5, leaf.in_features, generator=torch.Generator().manual_seed(3))
            residuals, leaf.residuals = leaf.residuals, ()
            without, leaf.residuals = leaf(x), residuals
            name = f"lora_unet_{path.replace('.', '_')}"
            up, down = lora[f"{name}.lora_up.weight"].float(), lora[f"{name}.lora_down.weight"].float()
            expected = F.linear(x, up @ down * float(lora[f"{name}.alpha"]) / down.shape[0])
            torch.testing.assert_close(leaf(x) - without, expected, rtol=1e-3, atol=1e-3)
            break
    else:
        pytest.fail("no leaf has a residual")
    patchers.sample(rotated)  # leaves the model to this MODEL, whose leaves outlive the clone


def test_patching_nothing_changes_no_code(rotated):
    for leaf in patchers.leaves(rotated).values():
        again = leaf.weight.requantize_from_float(leaf.weight.dequantize())
        different = (again._qdata != leaf.weight._qdata).float().mean()
        assert float(different) < 1e-3  # an entry between two codes may fall to either side


def test_a_copy_is_its_own(rotated):
    leaf = next(leaf for leaf in patchers.leaves(rotated).values() if leaf.permutations is not None)
    twin = copy.deepcopy(leaf)
    assert torch.equal(twin.weight.dequantize(), leaf.weight.dequantize())
    assert torch.equal(twin.permutations, leaf.permutations)
    x = torch.randn(2, 5, leaf.in_features)
    with torch.inference_mode():
        assert torch.equal(twin(x), leaf(x))
