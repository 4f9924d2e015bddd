"""Linear weights in bitsandbytes' NF4 and FP4: the leaf contract in the host's own patcher, files, LoRA, refusals."""

import builtins
import copy
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from support import loras, patchers

import comfy.utils  # isort: skip
from comfy.quant_ops import QuantizedTensor  # isort: skip

pytestmark = pytest.mark.rounding

nf4 = patchers.module("tfmq.host.leaf.nf4")
scheme = patchers.module("tfmq.scheme")
swap = patchers.module("tfmq.host.quantize")
store = patchers.module("tfmq.host.store")
FORMS = ("nf4", "fp4")
BITS = 4 + 16 / 64

installed = pytest.importorskip("bitsandbytes", reason="bitsandbytes cannot be installed here: no NF4 and FP4")


@pytest.fixture(scope="module")
def calibration(base):
    return patchers.calibrate(base).load()


def quantize(base, calibration, form="nf4"):
    recipe = scheme.Recipe(f"W4A16 {form}", weight_bits=4, activation_bits=16, weight_format=form)
    with torch.inference_mode():
        return swap.quantize(base, calibration, recipe, lambda *_: None)


@pytest.fixture(scope="module")
def quantized(base, calibration):
    return quantize(base, calibration)


def linears(patcher):
    found = {path: leaf for path, leaf in patchers.leaves(patcher).items() if not leaf.geometry.is_conv}
    assert found
    return found


def layer(form, shape, dtype=torch.float32, seed=0):
    """A leaf of its own, and the weight that it was made from."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    module = nn.Linear(shape[1], shape[0], dtype=dtype)
    state = nf4.solve(scheme.Scheme(4, 16, scheme.NONE, weight_format=form), weight)
    geometry = patchers.module("tfmq.geometry").geometry_of(module)
    leaf = patchers.module("tfmq.host.leaf.leaf").make_leaf(module, state, geometry, None, module.bias.detach(), dtype)
    return leaf, weight


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_leaf_computes_as_bitsandbytes_does(form, dtype):
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import quantize_4bit

    leaf, weight = layer(form, (48, 128), dtype)
    x = torch.randn(2, 5, 128).to(dtype)
    with torch.inference_mode():
        y = leaf(x)
        codes, state = quantize_4bit(weight, blocksize=64, quant_type=form)
        wanted = matmul_4bit(x, codes, state, bias=leaf.bias)
    assert y.dtype is dtype and y.shape == (2, 5, 48)
    assert torch.equal(leaf.weight._qdata.view(-1, 1), codes)
    # The scales are kept in 16 bits instead of 32.
    assert patchers.distance(y, wanted) < 2e-3 if dtype is not torch.bfloat16 else 1e-2
    error = patchers.distance(leaf.weight.dequantize(), weight)
    assert 0.05 < error < {"nf4": 0.1, "fp4": 0.14}[form]  # measured 0.092 and 0.124 on Gaussian weights
    assert F.linear(x.float(), leaf.weight.dequantize().float(), leaf.bias.float()).allclose(y.float(), atol=0.2)


@pytest.mark.parametrize("shape", [(3, 5), (10, 20), (48, 96), (7, 65), (64, 1)])
def test_shapes_that_no_block_divides(shape):
    leaf, weight = layer("nf4", shape)
    assert leaf.weight.shape == shape and leaf.weight._qdata.shape == (-(-weight.numel() // 64), 32)
    dense = leaf.weight.dequantize()
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    reach = blocks.abs().amax(1, keepdim=True).expand(-1, 64).flatten()[: weight.numel()].view(shape)
    # Half the widest gap of the codes. bitsandbytes' own function for CPUs gives wrong scales at such shapes.
    assert ((dense - weight).abs() <= 0.16 * reach).all()
    x = torch.randn(4, shape[1])
    with torch.inference_mode():
        assert leaf(x).allclose(F.linear(x, dense, leaf.bias), atol=1e-4)
        assert leaf(x[:0]).shape == (0, shape[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_model_of_such_layers(base, calibration, form):
    patcher = quantize(base, calibration, form)
    found = linears(patcher)
    for path, leaf in found.items():
        replaced = base.model.get_submodule(f"diffusion_model.{path}")
        assert leaf.weight._layout_cls == nf4.NAME and leaf.weight._params.form == form
        assert leaf.weight.shape == replaced.weight.shape and leaf.weight.dtype == replaced.weight.dtype
        assert "Linear" in type(leaf).__name__ and not list(leaf.children())
        kept = leaf.weight._qdata.nbytes + leaf.weight._params.scale.nbytes
        assert kept * 8 == pytest.approx(BITS * leaf.weight.numel(), rel=1e-3)
    convolutions = [leaf for leaf in patchers.leaves(patcher).values() if leaf.geometry.is_conv]
    assert convolutions and all(leaf.scheme.weight_format == "int" for leaf in convolutions)
    assert 0.01 < patchers.distance(patchers.sample(patcher), patchers.sample(base)) < 0.3
    text = patchers.module("tfmq.host.summary").text(patcher.attachments["tfmq"])
    assert f"{len(found)} Linear W4A16 {form}" in text and f"bitsandbytes ({len(found)} layers)" in text


def test_the_size_that_the_host_counts_with_is_that_of_the_parts(base, quantized):
    saved = 0
    for path, leaf in patchers.leaves(quantized).items():
        replaced = base.model.get_submodule(f"diffusion_model.{path}")
        parts = leaf.weight.layout_cls.state_dict_tensors(leaf.weight._qdata, leaf.weight._params)
        saved += replaced.weight.nbytes - sum(part.nbytes for part in parts.values())
    # A layout holds a few bytes for what a layer does not have.
    assert quantized.model_size() == pytest.approx(base.model_size() - saved, rel=1e-3)


def test_moving_copying_and_patching_a_leaf(quantized):
    leaf = next(iter(linears(quantized).values()))
    codes, x = leaf.weight._qdata.clone(), torch.randn(2, 3, leaf.in_features)
    with torch.inference_mode():
        y = leaf(x)
        twin = copy.deepcopy(leaf)
        assert twin.weight is not leaf.weight and torch.equal(twin(x), y)
        assert torch.equal(leaf.to("cpu")(x), y)
        moved = copy.deepcopy(leaf).to("meta")
        assert moved.weight.device.type == "meta" and moved.weight.shape == leaf.weight.shape
        twin.to(torch.float16)
        assert twin.weight._qdata.dtype is torch.uint8 and torch.equal(twin.weight._qdata, codes)
        value = leaf.convert_weight(leaf.weight, inplace=True)
        assert type(value) is torch.Tensor and value.shape == leaf.weight.shape
        value = value.clone()
        value[0] += 0.1
        returned = leaf.set_weight(value, inplace_update=False, seed=1, return_weight=True)
        assert isinstance(returned, QuantizedTensor) and returned._params.form == "nf4"
        first = -(-leaf.in_features // nf4.BLOCK)  # blocks of the row that was touched
        assert torch.equal(returned._qdata[first:], codes[first:])  # what was not touched keeps its codes
        assert not torch.equal(returned._qdata[:first], codes[:first])
        leaf.set_weight(value, inplace_update=False, seed=1)
        assert torch.equal(leaf.weight._qdata, codes) and torch.equal(leaf(x), y)
        leaf.set_weight(value, inplace_update=True)  # a LoRA on a hook: in float as long as it is on
        assert leaf(x).allclose(F.linear(x, value.float(), leaf.bias), atol=1e-4)
        leaf.hooked = None


@pytest.mark.parametrize("megabytes", [4, 10])
def test_partial_loading_gives_the_same_picture(quantized, monkeypatch, megabytes):
    whole = patchers.sample(quantized)
    patchers.weights(quantized)  # unloads
    patchers.only(megabytes, monkeypatch)
    assert torch.equal(patchers.sample(quantized), whole)
    assert quantized.model.model_lowvram
    assert any(not getattr(leaf, "comfy_patched_weights", False) for leaf in linears(quantized).values())
    patchers.weights(quantized)


def test_a_lora_is_added_in_float(base, quantized, tmp_path):
    shapes = {path: leaf.weight.shape for path, leaf in linears(quantized).items()}
    file = loras.write(loras.kohya(shapes), tmp_path / "lora.safetensors")
    lora = comfy.utils.load_torch_file(str(file))
    before = {path: leaf.weight._qdata.clone() for path, leaf in linears(quantized).items()}
    plain = patchers.sample(quantized)
    with_lora = loras.apply(quantized, lora, 1.0)
    change = patchers.sample(with_lora) - plain
    assert all(leaf.residuals for leaf in linears(with_lora).values())
    assert all(torch.equal(leaf.weight._qdata, before[path]) for path, leaf in linears(with_lora).items())
    wanted = patchers.sample(loras.apply(base, lora, 1.0)) - patchers.sample(base)
    assert patchers.distance(change, wanted) < 0.5  # measured 0.29: all around it is in 4 bits
    assert torch.equal(patchers.sample(quantized), plain)


@pytest.fixture(scope="module")
def saved(quantized):
    with torch.inference_mode():
        return store.save(quantized, "tfmq/nf4")


def test_the_file_gives_the_same_picture(quantized, saved):
    with torch.inference_mode():
        loaded = store.load(str(saved))
    assert torch.equal(patchers.sample(loaded), patchers.sample(quantized))
    after = linears(loaded)
    for path, leaf in linears(quantized).items():
        assert type(after[path]) is type(leaf) and after[path].scheme == leaf.scheme
        assert torch.equal(after[path].weight._qdata, leaf.weight._qdata)
        assert torch.equal(after[path].weight._params.scale, leaf.weight._params.scale)


def without_bitsandbytes(monkeypatch):
    """Make `import bitsandbytes` fail as where it is not installed."""
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(sys.modules, "bitsandbytes")


def test_without_bitsandbytes_the_recipe_and_the_file_are_refused_with_a_sentence(
    base, calibration, saved, monkeypatch
):
    objects = dict(base.object_patches)
    without_bitsandbytes(monkeypatch)
    for refused in (lambda: quantize(base, calibration), lambda: store.load(str(saved))):
        with pytest.raises(patchers.TfmqError) as error:
            refused()
        assert "pip install bitsandbytes" in str(error.value) and "\n" not in str(error.value)
    assert base.object_patches == objects
    with torch.inference_mode():  # all else goes on working
        swap.quantize(base, calibration, scheme.PRESETS["W8A8"], lambda *_: None)


def test_a_broken_or_unfit_bitsandbytes_is_refused(monkeypatch):
    with pytest.raises(patchers.TfmqError, match="not on this machine's meta"):
        nf4.require(torch.device("meta"))
    original = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "bitsandbytes":
            raise OSError("libcudart.so is missing")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(patchers.TfmqError, match="libcudart"):
        nf4.require(torch.device("cpu"))


def test_weights_that_are_not_finite_are_refused(base, calibration):
    weight = torch.ones(4, 64)
    weight[1, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        nf4.solve(dataclasses.replace(scheme.Scheme(), weight_format="nf4"), weight)


def test_the_pack_imports_nothing_of_bitsandbytes_by_itself():
    for file in (Path(nf4.__file__).parents[1]).rglob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert not line.startswith(("import bitsandbytes", "from bitsandbytes")), file
