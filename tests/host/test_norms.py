"""GroupNorm, SiLU and convolution of a quantized MODEL's blocks are one operation, and the same."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from support import loras, patchers, ties

import comfy.model_management  # isort: skip

ours = patchers.module("tfmq.host.faster.norms")
chains = patchers.module("tfmq.runtime.norm_silu_conv")
onednn = patchers.module("tfmq.kernels.onednn")
store = patchers.module("tfmq.host.store")

pytestmark = [
    pytest.mark.rounding,
    pytest.mark.skipif(onednn.missing() is not None, reason=f"no oneDNN here: {onednn.missing()}"),
]


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


# Of float32, between a norm's input and the code: mean and variance (sums of a few hundred terms, added in vectors: as
# many as a tree of them is deep), root, gain, shift, product, sum; SiLU has five, the grid two.
ROUNDINGS = 32


def compared(patcher, **options):
    """Assert of every block of a run that in one operation it makes what its layers make one after another: codes that
    part at ties alone, outputs that differ by what those codes are worth. The number of blocks."""
    run, padded, count = chains.run, onednn._padded_codes, 0
    grids = []

    def kept(x, grid, *rest):
        q = padded(x, grid, *rest)
        grids.append((grid, q))
        return q

    def both(sequence, x, *rest):
        nonlocal count
        grids.clear()
        found = run(sequence, x, *rest)
        together = grids.copy()
        grids.clear()
        plain = nn.Sequential.forward(sequence, x)
        parts = list(zip(together, grids, strict=True))
        leaf = sequence[-1]
        difference = torch.zeros_like(plain)
        if parts:  # none where somebody has the layer compute in float
            ((grid, one), (_, other)) = parts[0]
            assert len(parts) == 1
            assert torch.equal(grid.scale, grids[0][0].scale) and grid.inverse_balance is None
            exact = chain_exactly(sequence, x) / grid.scale.double() + grid.zero_point
            edges = zip(leaf.geometry.padding, x.shape[2:], strict=True)
            inside = (..., *(slice(p, p + extent) for p, extent in edges))
            noise = ties.noise_of(exact - grid.zero_point, ROUNDINGS)
            ties.only_ties_differ(one[inside], other[inside], exact, noise)
            changed = (one.double() - other.double()) * grid.scale.double()
            difference = F.conv2d(changed, leaf.weight.dequantize().double(), stride=leaf.geometry.stride)
            count += 1
        # The sums are those of integers; scale, bias and a LoRA are a few roundings more.
        assert float((found - plain - difference).abs().max()) <= 8 * ties.EPS * float(plain.abs().max())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "run", both)
        patch.setattr(onednn, "_padded_codes", kept)
        patchers.sample(patcher, **options)
    return count


def chain_exactly(sequence, x):
    """What the convolution of the block gets, float64; a norm whose `forward` somebody replaced computes itself."""
    x = x.double()
    for module in list(sequence)[:-1]:
        if isinstance(module, nn.GroupNorm):
            factor = 1.5 if "forward" in vars(module) else 1.0
            weight, bias = norm_parameters(module)
            x = factor * F.group_norm(x, module.num_groups, weight, bias, module.eps)
        else:
            x = module(x)
    return x


def norm_parameters(norm):
    """float64, with what the host adds to them at every call."""
    weight, bias = norm.weight, norm.bias
    for function in norm.weight_function:
        weight = function(weight)
    return weight.double(), bias.double()


def test_every_block_with_a_quantized_convolution_takes_it(quantized, counted):
    blocks = patched(quantized)
    convolutions = [path for path, leaf in patchers.leaves(quantized).items() if leaf.geometry.is_conv]
    assert {path.rpartition(".")[0] for path in convolutions if "_layers." in path} == set(blocks)
    assert blocks
    patchers.sample(quantized, steps=1)
    assert len(counted) == len(blocks)
    apart(quantized, steps=1)
    assert len(counted) == len(blocks)
    assert compared(quantized, steps=1) == len(blocks)


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
    assert compared(with_lora, steps=1) == len(others) + 1  # the leaf with the LoRA still makes codes
    assert patchers.distance(found, plain) > 0.01
    assert torch.equal(patchers.sample(quantized, steps=1), plain)


def test_a_lora_on_the_norm_is_heard(quantized, counted, monkeypatch):
    """Merged into its weight, or where the MODEL is streamed, added at every call."""
    clone = quantized.clone()
    for path in patched(quantized):
        width = quantized.model.get_submodule(f"diffusion_model.{path}")[0].num_channels
        clone.add_patches({f"diffusion_model.{path}.0.weight": ("diff", (torch.full((width,), 0.2),))})
    plain, found = patchers.sample(quantized), patchers.sample(clone)
    assert patchers.distance(found, plain) > 0.01
    assert compared(clone, steps=1) == len(patched(quantized))
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
        assert compared(quantized, steps=1) == len(patched(quantized)) - (changed == "weight")
        assert patchers.distance(found, plain) > 0.01
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
