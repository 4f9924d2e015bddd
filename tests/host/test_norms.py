"""GroupNorm, SiLU and convolution of a quantized MODEL's blocks are one operation, and the same."""

import pytest
import torch
from torch import nn

from support import loras, patchers

import comfy.model_management  # isort: skip

ours = patchers.module("tfmq.host.norms")
chains = patchers.module("tfmq.norm_chain")
onednn = patchers.module("tfmq.kernels.onednn")
store = patchers.module("tfmq.host.store")

pytestmark = pytest.mark.skipif(onednn.missing() is not None, reason=f"no oneDNN here: {onednn.missing()}")


def patched(patcher):
    """Paths of the blocks that compute their norm with their convolution."""
    keys = [key for key in patcher.object_patches if key.endswith(".forward")]
    found = [key.removeprefix("diffusion_model.").removesuffix(".forward") for key in keys]
    network = patcher.model.diffusion_model
    return [path for path in found if type(network.get_submodule(path)) is nn.Sequential]


@pytest.fixture
def counted(monkeypatch):
    """Shapes that the operation was called with."""
    shapes = []
    operation = onednn.conv2d_static_normed

    def watched(x, *rest, **named):
        shapes.append(tuple(x.shape))
        return operation(x, *rest, **named)

    monkeypatch.setattr(onednn, "conv2d_static_normed", watched)
    return shapes


def apart(patcher, **options):
    """The latent with one layer after another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "run", lambda sequence, x, *_: nn.Sequential.forward(sequence, x))
        return patchers.sample(patcher, **options)


def as_apart(patcher):
    """In float32 the norm alone can be rounded differently, and a code near a tie with it, which then moves the latent
    by 2e-3: so of five noises for all but one."""
    pairs = [(patchers.sample(patcher, seed=seed, steps=1), apart(patcher, seed=seed, steps=1)) for seed in range(5)]
    *most, worst = sorted(patchers.distance(*pair) for pair in pairs)
    return most[-1] < 1e-3 and worst < 1e-2


def test_every_block_with_a_quantized_convolution_takes_it(quantized, counted):
    blocks = patched(quantized)
    convolutions = [path for path, leaf in patchers.leaves(quantized).items() if leaf.geometry.is_conv]
    assert {path.rpartition(".")[0] for path in convolutions if "_layers." in path} == set(blocks)
    assert blocks
    patchers.sample(quantized, steps=1)
    assert len(counted) == len(blocks)
    apart(quantized, steps=1)
    assert len(counted) == len(blocks)
    assert as_apart(quantized)


def test_in_bfloat16_with_the_hosts_own_cast(quantized, counted):
    clone = quantized.clone()
    clone.set_model_compute_dtype(torch.bfloat16)
    found, before = patchers.sample(clone), apart(clone)
    assert counted
    assert 0 < patchers.distance(found, before) < 0.05


def test_parts_of_a_block_are_as_before(quantized):
    """The host takes a block apart where it resamples."""
    patchers.sample(quantized)
    block = quantized.model.get_submodule(f"diffusion_model.{patched(quantized)[0]}")
    part = block[:-1]
    assert type(part) is nn.Sequential and "forward" not in vars(part) and list(part) == list(block)[:-1]
    x = torch.randn(1, block[0].num_channels, 4, 4)
    with torch.inference_mode():
        assert torch.equal(part(x), block[1](block[0](x)))


def test_a_loaded_file_has_them(quantized, counted, tmp_path):
    with patchers.files_in(tmp_path):
        loaded = store.load(str(store.save(quantized, "tfmq/norms")))
    assert patched(loaded) == patched(quantized)
    found = patchers.sample(loaded)
    assert counted
    assert torch.equal(found, patchers.sample(quantized))


def test_a_lora_on_the_convolution_gets_the_float_input(quantized, counted):
    first, *others = patched(quantized)
    plain = patchers.sample(quantized, steps=1)
    calls = len(counted)
    shapes = {path: leaf.weight.shape for path, leaf in patchers.leaves(quantized).items() if path.startswith(first)}
    assert len(shapes) == 1
    with_lora = loras.apply(quantized, loras.kohya(shapes), 1.0)
    found = patchers.sample(with_lora, steps=1)
    assert len(counted) == calls + len(others)
    assert as_apart(with_lora) and patchers.distance(found, plain) > 0.01
    assert torch.equal(patchers.sample(quantized, steps=1), plain)


def test_a_lora_on_the_norm_is_heard(quantized, counted, monkeypatch):
    """Merged into its weight, or where the MODEL is streamed, added at every call."""
    clone = quantized.clone()
    for path in patched(quantized):
        width = quantized.model.get_submodule(f"diffusion_model.{path}")[0].num_channels
        clone.add_patches({f"diffusion_model.{path}.0.weight": ("diff", (torch.full((width,), 0.2),))})
    plain, found = patchers.sample(quantized), patchers.sample(clone)
    assert patchers.distance(found, plain) > 0.01
    assert as_apart(clone)
    patchers.weights(quantized)  # unloads
    patchers.only(0, monkeypatch)
    counted.clear()
    assert torch.equal(patchers.sample(clone), found)
    assert clone.model.model_lowvram and counted
    streamed = [clone.model.get_submodule(f"diffusion_model.{path}.0") for path in patched(quantized)]
    assert all(norm.comfy_cast_weights and norm.weight_function for norm in streamed)
    patchers.weights(quantized)


@pytest.mark.parametrize("changed", ["weight", "hook", "forward"])
def test_what_others_hang_on_a_layer_is_heard(quantized, counted, changed):
    plain = patchers.sample(quantized, steps=1)
    path, calls = patched(quantized)[0], len(counted)
    block = quantized.model.get_submodule(f"diffusion_model.{path}")
    leaf, handle = block[-1], None
    if changed == "weight":  # another pack's weight function: the host hands over a float weight
        leaf.weight_function.append(lambda weight: weight * 1.5)
    elif changed == "hook":
        handle = leaf.register_forward_hook(lambda module, args, y: y * 1.5)
    else:
        own = block[0].forward
        block[0].forward = lambda x: own(x) * 1.5
    try:
        found = patchers.sample(quantized, steps=1)
        assert len(counted) == calls + len(patched(quantized)) - 1
        assert as_apart(quantized) and patchers.distance(found, plain) > 0.01
    finally:
        leaf.weight_function.clear()
        vars(block[0]).pop("forward", None)
        if handle is not None:
            handle.remove()
    assert torch.equal(patchers.sample(quantized, steps=1), plain)


def test_an_interrupt_comes_through(quantized):
    plain = patchers.sample(quantized)
    block = quantized.model.get_submodule(f"diffusion_model.{patched(quantized)[0]}")
    x = torch.randn(1, block[0].num_channels, 4, 4)
    comfy.model_management.interrupt_current_processing(True)
    with torch.inference_mode(), pytest.raises(comfy.model_management.InterruptProcessingException):
        block(x)
    assert not comfy.model_management.processing_interrupted()
    assert torch.equal(patchers.sample(quantized), plain)


@pytest.mark.parametrize("cast", [False, True])
def test_a_norm_that_another_pack_replaces_for_all_is_called(quantized, counted, monkeypatch, cast):
    """AnimateDiff-Evolved does so while it samples. cast: the host casts the norm's parameters."""
    clone = quantized.clone()
    if cast:
        clone.set_model_compute_dtype(torch.bfloat16)
    owner, name = (ours.HOST_NORM, "forward_comfy_cast_weights") if cast else (nn.GroupNorm, "forward")
    inner, calls = getattr(owner, name), []

    def watched(self, x):
        calls.append(x.shape)
        return inner(self, x)

    monkeypatch.setattr(owner, name, watched)
    patchers.sample(clone, steps=1)
    assert len(calls) >= len(patched(quantized)) and not counted
