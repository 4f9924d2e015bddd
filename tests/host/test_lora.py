"""LoRA before quantization is baked in; behind it, it is added in float and the codes stay as they are."""

import pytest
import torch
from torch.nn import functional as F

from support import loras, patchers

import comfy.hooks  # isort: skip
import comfy.lora  # isort: skip
import comfy.model_management  # isort: skip
import comfy.utils  # isort: skip
from comfy.quant_ops import QuantizedTensor  # isort: skip

pytestmark = [pytest.mark.rounding, pytest.mark.usefixtures("folder")]


@pytest.fixture(scope="module")
def shapes(quantized):
    """Every quantized layer."""
    return {path: leaf.weight.shape for path, leaf in patchers.leaves(quantized).items()}


@pytest.fixture(scope="module")
def lora(shapes, tmp_path_factory):
    """As read from a file."""
    path = loras.write(loras.kohya(shapes), tmp_path_factory.mktemp("loras") / "kohya.safetensors")
    return comfy.utils.load_torch_file(str(path))


LIMIT_OF_CHANGE = {0.3: 0.35, 1.0: 0.12, -0.5: 0.21}  # measured 0.22, 0.075, 0.14


def codes(patcher):
    return {path: leaf.weight._qdata.clone() for path, leaf in patchers.leaves(patcher).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def one_of_each(patcher, count=1):
    """Paths of some Linear and some Conv2d leaves."""
    found = patchers.leaves(patcher)
    linear = [path for path, leaf in found.items() if not leaf.geometry.is_conv]
    return linear[:count] + [path for path, leaf in found.items() if leaf.geometry.is_conv][:count]


def added(leaf, x):
    """What the LoRAs add to the output of a leaf."""
    residuals, leaf.residuals = leaf.residuals, ()
    without, leaf.residuals = leaf(x), residuals
    return leaf(x) - without


def of_weight(leaf, x, difference):
    if not leaf.geometry.is_conv:
        return F.linear(x, difference)
    g = leaf.geometry
    return F.conv2d(x, difference, None, g.stride, g.padding, g.dilation, g.groups)


def random_input(leaf):
    shape = (2, leaf.in_channels, 6, 5) if leaf.geometry.is_conv else (2, 5, leaf.in_features)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def hosts_difference(patcher, path):
    """The dW that the host's own merge makes of the patches on a layer."""
    key = f"diffusion_model.{path}.weight"
    start = patchers.leaves(patcher)[path].weight.dequantize().float()
    return comfy.lora.calculate_weight(patcher.patches[key], start.clone(), key) - start


def test_a_lora_before_quantization_is_baked_in(base, lora):
    patched = loras.apply(base, lora, 0.8)
    baked = patchers.quantize(patched, patchers.calibrate(patched))
    assert not [key for key in baked.patches if key.rpartition(".")[0].endswith(tuple(patchers.leaves(baked)))]

    merged = patchers.load()
    for key, patches in patched.patches.items():
        weight = comfy.utils.get_attr(merged.model, key)
        weight.data = comfy.lora.calculate_weight(patches, weight.data.clone(), key)
    reference = patchers.quantize(merged, patchers.calibrate(merged))
    assert same(codes(baked), codes(reference))
    assert torch.equal(patchers.sample(baked), patchers.sample(reference))
    assert patchers.distance(patchers.sample(baked), patchers.sample(patched)) < 0.05


@pytest.mark.parametrize("strength", [0.3, 1.0, -0.5])
def test_a_lora_behind_quantization_leaves_the_codes_alone(base, quantized, lora, strength):
    before, plain = codes(quantized), patchers.sample(quantized)
    with_lora = loras.apply(quantized, lora, strength)
    change = patchers.sample(with_lora) - plain
    assert same(codes(with_lora), before)
    wanted = patchers.sample(loras.apply(base, lora, strength)) - patchers.sample(base)
    # What is left is the noise of the activations, as without a LoRA; the smaller the LoRA, the more it counts.
    assert patchers.distance(change, wanted) < LIMIT_OF_CHANGE[strength]
    assert torch.equal(patchers.sample(quantized), plain)
    assert same(codes(quantized), before)
    assert all(leaf.residuals == () for leaf in patchers.leaves(quantized).values())


def test_a_lora_is_added_without_any_rounding_where_the_hosts_int8_rounds_it(base, quantized, lora):
    with_lora = loras.apply(quantized, lora, 1.0)
    patchers.sample(with_lora)
    for path in one_of_each(quantized, 2):
        leaf = patchers.leaves(with_lora)[path]
        assert leaf.residuals and leaf.residuals[0].up is not None, "no low-rank branch"
        x, wanted = random_input(leaf), hosts_difference(with_lora, path)
        assert patchers.distance(added(leaf, x), of_weight(leaf, x, wanted)) < 1e-4
        if leaf.geometry.is_conv:
            continue
        # The host's own way with its own format, for comparison: merge into the codes and round all of them again.
        native = QuantizedTensor.from_float(
            base.model.get_submodule(f"diffusion_model.{path}").weight.data, "TensorWiseINT8Layout", per_channel=True
        )
        merged = QuantizedTensor.from_float(native.dequantize() + wanted, "TensorWiseINT8Layout", per_channel=True)
        assert patchers.distance(merged.dequantize() - native.dequantize(), wanted) > 0.02  # measured 0.037


def test_two_loras_add_up_and_come_off_again(quantized, shapes, lora):
    plain, before = patchers.sample(quantized), codes(quantized)
    second = loras.kohya(shapes, rank=2, seed=9)
    first = loras.apply(quantized, lora, 0.7)
    one = patchers.sample(first)
    both = loras.apply(first, second, -0.4)
    two = patchers.sample(both)
    assert not torch.equal(one, two) and not torch.equal(one, plain)
    for path in one_of_each(both):
        leaf = patchers.leaves(both)[path]
        assert len(leaf.residuals) == 2
        x = random_input(leaf)
        assert patchers.distance(added(leaf, x), of_weight(leaf, x, hosts_difference(both, path))) < 1e-4
    assert torch.equal(patchers.sample(first), one)
    assert torch.equal(patchers.sample(quantized), plain)
    assert same(codes(quantized), before)


@pytest.mark.parametrize("kind", ["loha", "lokr", "difference"])
def test_other_kinds_of_patches_are_added_as_they_are(quantized, kind):
    plain, before = patchers.sample(quantized), codes(quantized)
    chosen = one_of_each(quantized)
    made = getattr(loras, kind)({path: patchers.leaves(quantized)[path].weight.shape for path in chosen})
    patched = loras.apply(quantized, made, 0.9)
    assert len(patched.patches) == len(chosen)
    assert not torch.equal(patchers.sample(patched), plain)
    for path in chosen:
        leaf = patchers.leaves(patched)[path]
        assert [r.up for r in leaf.residuals] == [None]
        x = random_input(leaf)
        assert patchers.distance(added(leaf, x), of_weight(leaf, x, hosts_difference(patched, path))) < 1e-4
    assert same(codes(quantized), before)
    assert torch.equal(patchers.sample(quantized), plain)


def test_a_lora_on_a_slice_of_the_outputs(quantized):
    """As for the query, key and value parts of a fused layer."""
    path = one_of_each(quantized)[0]
    shape = patchers.leaves(quantized)[path].weight.shape
    rows = shape[0] // 4
    part = loras.kohya({path: torch.Size([rows, shape[1]])})
    key = f"diffusion_model.{path}.weight"
    name = f"lora_unet_{path.replace('.', '_')}"
    loaded = comfy.lora.load_lora(part, {name: (key, (0, rows, rows))})
    patched = quantized.clone()
    assert patched.add_patches(loaded, 1.0)
    plain = patchers.sample(quantized)
    assert not torch.equal(patchers.sample(patched), plain)
    leaf = patchers.leaves(patched)[path]
    x = random_input(leaf)
    change = added(leaf, x)
    assert patchers.distance(change, of_weight(leaf, x, hosts_difference(patched, path))) < 1e-4
    assert change[..., rows : 2 * rows].abs().min() > 0
    assert not change[..., :rows].any() and not change[..., 2 * rows :].any()
    assert torch.equal(patchers.sample(quantized), plain)


def test_a_difference_of_the_bias(quantized):
    path = next(path for path in one_of_each(quantized) if patchers.leaves(quantized)[path].bias is not None)
    bias = patchers.leaves(quantized)[path].bias
    difference = torch.randn(bias.shape, generator=torch.Generator().manual_seed(5))
    patched = loras.apply(quantized, {f"lora_unet_{path.replace('.', '_')}.diff_b": difference}, 0.5)
    plain, value = patchers.sample(quantized), bias.clone()
    assert not torch.equal(patchers.sample(patched), plain)
    assert torch.allclose(patchers.leaves(patched)[path].bias, value + 0.5 * difference)
    assert torch.equal(patchers.sample(quantized), plain)


@pytest.mark.parametrize("megabytes", [4, 12])
def test_partial_loading_does_not_count_a_lora_twice(quantized, lora, monkeypatch, megabytes):
    with_lora = loras.apply(quantized, lora, 1.0)
    whole, plain = patchers.sample(with_lora), patchers.sample(quantized)
    patchers.weights(quantized)  # unloads
    patchers.only(megabytes, monkeypatch)
    assert torch.equal(patchers.sample(with_lora), whole)
    assert with_lora.model.model_lowvram
    assert any(not getattr(leaf, "comfy_patched_weights", False) for leaf in patchers.leaves(with_lora).values())
    monkeypatch.undo()
    patchers.weights(quantized)
    assert torch.equal(patchers.sample(with_lora), whole)
    with_lora.partially_unload(with_lora.offload_device, 6_000_000)
    patchers.only(0, monkeypatch)
    assert torch.equal(patchers.sample(with_lora), whole)
    monkeypatch.undo()
    assert torch.equal(patchers.sample(quantized), plain)


def test_unloading_everything_between_two_runs(base, quantized, lora):
    """As the host does it on request, outside of inference mode."""
    with_lora = loras.apply(quantized, lora, 1.0)
    picture, plain, floats = patchers.sample(with_lora), patchers.sample(quantized), patchers.sample(base)
    for patcher, wanted in ((with_lora, picture), (quantized, plain), (with_lora, picture), (base, floats)):
        assert not torch.is_inference_mode_enabled()
        comfy.model_management.unload_all_models()
        assert torch.equal(patchers.sample(patcher), wanted)


def hooked(lora, strength, start=0.0):
    hooks = comfy.hooks.create_hook_lora(lora, strength, 0.0)
    if start:
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.0))
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=start))
        hooks.set_keyframes_on_hooks(frames)
    return comfy.hooks.set_hooks_for_conditioning(patchers.conditioning(1), hooks)


def test_a_hooked_lora_takes_effect_and_goes_away(base, quantized, lora):
    plain, before = patchers.sample(quantized), codes(quantized)
    change = patchers.sample(quantized, hooked(lora, 1.0)) - plain
    assert same(codes(quantized), before)
    assert torch.equal(patchers.sample(quantized), plain)
    wanted = patchers.sample(base, hooked(lora, 1.0)) - patchers.sample(base)
    assert patchers.distance(change, wanted) < LIMIT_OF_CHANGE[1.0]
    again = patchers.sample(quantized, hooked(lora, 1.0)) - plain
    assert torch.equal(again, change)


def test_a_hooked_lora_on_one_branch_and_part_of_the_way(base, quantized, lora):
    plain = patchers.sample(quantized, cfg=3.0, negative=patchers.conditioning(2), steps=4)
    for start in (0.0, 0.5):
        options = {"cfg": 3.0, "negative": patchers.conditioning(2), "steps": 4}
        picture = patchers.sample(quantized, hooked(lora, 1.0, start), **options)
        assert patchers.distance(picture, patchers.sample(base, hooked(lora, 1.0, start), **options)) < 0.1
        assert patchers.distance(picture, plain) > 0.01
        assert torch.equal(patchers.sample(quantized, **options), plain)


def test_a_strength_that_changes_stays_off_what_has_no_hook(quantized, lora, monkeypatch):
    """The first of the two calls of each step has none."""
    module, calls = patchers.module("tfmq.host.leaf.leaf"), []
    for kind in (module.QuantLinear, module.QuantConv2d):
        own = kind.float_forward
        monkeypatch.setattr(kind, "float_forward", lambda leaf, *a, own=own: calls.append(leaf) or own(leaf, *a))
    counts = []
    for starts in ((), (0.0, 0.3, 0.6)):
        calls.clear()
        hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
        frames = comfy.hooks.HookKeyframeGroup()
        for start in starts:
            frames.add(comfy.hooks.HookKeyframe(strength=1.0 - start, start_percent=start))
        if starts:
            hooks.set_keyframes_on_hooks(frames)
        negative = comfy.hooks.set_hooks_for_conditioning(patchers.conditioning(2), hooks)
        patchers.sample(quantized, negative=negative, cfg=3.0, steps=4)
        counts.append(len(calls))
    assert counts[0] and counts[0] % 4 == 0 and counts == counts[:1] * 2


def test_a_hooked_lora_beside_one_that_is_loaded(quantized, shapes, lora):
    with_lora = loras.apply(quantized, loras.kohya(shapes, seed=4), 0.6)
    plain, before = patchers.sample(with_lora), codes(with_lora)
    assert not torch.equal(patchers.sample(with_lora, hooked(lora, 1.0)), plain)
    assert torch.equal(patchers.sample(with_lora), plain)
    assert same(codes(with_lora), before)
