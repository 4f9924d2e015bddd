"""The leaf contract in the host's own patcher: cloning, loading, partial loading, going back to the base model."""

import copy
import pickle

import pytest
import torch
from torch import nn

from support import patchers

import comfy.memory_management  # isort: skip
import comfy.model_management  # isort: skip
import comfy.model_patcher  # isort: skip
import comfy.ops  # isort: skip
import comfy.sd  # isort: skip
import comfy.utils  # isort: skip
from comfy.patcher_extension import PatcherInjection  # isort: skip
from comfy.quant_ops import QuantizedTensor  # isort: skip

fingerprint = patchers.module("tfmq.host.model").fingerprint
TfmqError = patchers.module("tfmq.errors").TfmqError
pytestmark = [pytest.mark.rounding, pytest.mark.usefixtures("folder")]


def test_a_model_on_another_device_than_the_hosts_is_released(base, quantized, monkeypatch):
    """As behind the node Select Model Device."""
    patchers.sample(quantized)
    path = next(iter(patchers.leaves(quantized)))
    assert base.model.get_submodule(f"diffusion_model.{path}") is patchers.leaves(quantized)[path]
    with monkeypatch.context() as patch:
        # It looks at the host's own device alone.
        patch.setattr(comfy.model_management, "unload_model_and_clones", lambda *_, **__: None)
        patchers.module("tfmq.host.model").release(base)
    assert isinstance(base.model.get_submodule(f"diffusion_model.{path}"), (nn.Linear, nn.Conv2d))


def test_a_bypass_lora_is_warned_of(quantized, caplog):
    clone = quantized.clone()
    clone.set_injections("bypass_lora", [PatcherInjection(lambda _: None, lambda _: None)])
    patchers.sample(quantized, steps=1)
    assert "bypass LoRA" not in caplog.text
    patchers.sample(clone)
    assert caplog.text.count("bypass LoRA") == 1


@pytest.fixture
def saved_by_the_host(tmp_path):
    def save(patcher):
        with torch.inference_mode():
            comfy.sd.save_checkpoint(str(tmp_path / "model.safetensors"), patcher)
        return tmp_path / "model.safetensors"

    return save


def linear_and_conv(patcher):
    found = patchers.leaves(patcher)
    linear = next(path for path, leaf in found.items() if "Linear" in type(leaf).__name__)
    conv = next(path for path, leaf in found.items() if "Conv2d" in type(leaf).__name__)
    return linear, conv


def test_the_output_is_close_to_that_of_the_float_model(base, quantized):
    error = patchers.distance(patchers.sample(quantized), patchers.sample(base))
    assert 1e-4 < error < 0.05  # measured 0.015 on these random weights; zero would mean that nothing is quantized


def test_the_base_model_is_bit_identical_after_use_of_a_quantized_clone(base, quantized):
    picture, weights = patchers.sample(base), patchers.weights(base)
    modules = {name: id(module) for name, module in base.model.named_modules()}
    patchers.sample(quantized)
    assert torch.equal(patchers.sample(base), picture)
    after = patchers.weights(base)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    assert {name: id(module) for name, module in base.model.named_modules()} == modules
    assert base.size == comfy.model_management.module_size(base.model)
    assert not base.wrappers.get("apply_model") and not base.object_patches


def test_the_patcher_is_new_to_the_host_and_has_its_true_size(base, quantized):
    assert quantized.patches_uuid != base.patches_uuid
    assert not quantized.is_clone(None) and quantized.is_clone(base)
    patchers.sample(base)  # the host must see that other weights are wanted now
    patchers.sample(quantized)
    for path, leaf in patchers.leaves(quantized).items():
        assert quantized.model.get_submodule(f"diffusion_model.{path}") is leaf
        assert leaf.comfy_patched_weights is True, path
    loaded = comfy.model_management.module_size(quantized.model)
    tables = sum(t.nbytes for leaf in patchers.leaves(quantized).values() for t in leaf.tables.tensors.values())
    assert quantized.model_size() == pytest.approx(loaded, rel=0.01)
    assert quantized.model_size() < 0.5 * base.model_size()
    assert 0 < tables < 0.01 * loaded
    assert quantized.clone().model_size() == quantized.model_size()


def test_a_clone_of_a_clone_gives_the_same_picture(quantized):
    picture = patchers.sample(quantized)
    assert torch.equal(patchers.sample(quantized.clone().clone()), picture)


def test_two_quantized_clones_of_one_model_do_not_disturb_each_other(base, calibration):
    static = patchers.quantize(base, calibration, activations="static")
    dynamic = patchers.quantize(base, calibration, activations="dynamic")
    first, second = patchers.sample(static), patchers.sample(dynamic)
    assert not torch.equal(first, second)
    assert torch.equal(patchers.sample(static), first)
    assert torch.equal(patchers.sample(dynamic), second)


def test_a_leaf_is_what_the_host_expects(base, quantized):
    patchers.module("tfmq.host.model").release(base)
    for path, leaf in patchers.leaves(quantized).items():
        replaced = base.model.get_submodule(f"diffusion_model.{path}")
        assert list(leaf.children()) == []
        assert isinstance(leaf, comfy.ops.CastWeightBiasOp) and not leaf.comfy_cast_weights
        assert set(dict(leaf.named_parameters())) == set(dict(replaced.named_parameters()))
        assert set(leaf.state_dict()) <= {"weight", "bias", "weight_scale", "weight_balance", "comfy_quant"}
        assert isinstance(leaf.weight, QuantizedTensor) and isinstance(leaf.weight, nn.Parameter)
        assert leaf.weight.shape == replaced.weight.shape and leaf.weight.dtype == replaced.weight.dtype
        assert not leaf.weight.requires_grad
        if isinstance(replaced, nn.Conv2d):
            assert "Conv2d" in type(leaf).__name__
            names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        else:
            assert "Linear" in type(leaf).__name__
            names = ("in_features", "out_features")
        for name in (*names, *(["padding_mode"] if isinstance(replaced, nn.Conv2d) else [])):
            assert getattr(leaf, name) == getattr(replaced, name)
        error = patchers.distance(leaf.weight.dequantize(), replaced.weight)
        assert 0 < error < 0.02, path


def test_convert_and_set_weight(quantized):
    for path in linear_and_conv(quantized):
        leaf = copy.deepcopy(patchers.leaves(quantized)[path])
        codes = leaf.weight._qdata.clone()
        value = leaf.convert_weight(leaf.weight, inplace=True)
        assert type(value) is torch.Tensor and value.is_floating_point() and value.shape == leaf.weight.shape
        value = value.clone()
        value[0] += 0.01
        returned = leaf.set_weight(value, inplace_update=False, seed=1, return_weight=True)
        assert isinstance(returned, QuantizedTensor)
        assert torch.equal(returned._qdata[1:], codes[1:])  # what was not touched keeps its codes
        assert not torch.equal(returned._qdata[0], codes[0])
        assert leaf.set_weight(value, inplace_update=False, seed=1) is None
        assert torch.equal(leaf.weight._qdata, codes)  # a load does not round the merged weight


def test_moving_and_copying_a_leaf(quantized):
    for path in linear_and_conv(quantized):
        leaf = patchers.leaves(quantized)[path]
        codes = leaf.weight._qdata.clone()
        x = torch.randn(2, *_input(leaf))
        y = leaf(x)
        twin = copy.deepcopy(leaf)
        assert twin.weight is not leaf.weight
        assert torch.equal(twin.weight._qdata, codes) and torch.equal(twin(x), y)
        assert torch.equal(leaf.to("cpu")(x), y)
        moved = copy.deepcopy(leaf).to("meta")
        assert moved.weight.device.type == "meta" and moved.weight.shape == leaf.weight.shape
        table = twin.act_scale
        twin.to(torch.float16)  # the codes and the tables must stay what they are
        assert twin.weight._qdata.dtype is torch.int8
        assert table is None or twin.act_scale.dtype is torch.float32
        state = leaf.state_dict()
        assert torch.equal(getattr(state["weight"], "_qdata", state["weight"]), codes)
        assert pickle.loads(pickle.dumps(leaf.scheme)) == leaf.scheme


def test_no_float_weight_is_made_in_the_forward_pass(quantized, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a float weight was made")

    monkeypatch.setattr(patchers.module("tfmq.host.leaf.layout").Int8Layout, "dequantize", refuse)
    monkeypatch.setattr(patchers.module("tfmq.host.leaf.leaf").QuantLinear, "float_forward", refuse)
    monkeypatch.setattr(patchers.module("tfmq.host.leaf.leaf").QuantConv2d, "float_forward", refuse)
    patchers.sample(quantized)


@pytest.mark.parametrize("megabytes", [4, 10, 20])
def test_partial_loading_gives_the_same_picture(base, quantized, monkeypatch, megabytes):
    whole = patchers.sample(quantized)
    patchers.weights(quantized)  # unloads
    patchers.only(megabytes, monkeypatch)
    assert torch.equal(patchers.sample(quantized), whole)
    assert quantized.model.model_lowvram
    streamed = [not getattr(leaf, "comfy_patched_weights", False) for leaf in patchers.leaves(quantized).values()]
    assert any(streamed)
    patchers.weights(quantized)
    monkeypatch.undo()
    assert torch.equal(patchers.sample(quantized), whole)
    assert not quantized.model.model_lowvram


def test_a_weight_that_is_streamed_lies_as_it_did(quantized):
    """By what the host does at every call to a weight that is not on the device."""
    memory = comfy.memory_management
    for path in linear_and_conv(quantized):
        leaf = patchers.leaves(quantized)[path]
        x = torch.randn(2, *_input(leaf))
        with torch.inference_mode():
            before = leaf(x)
            leaf = copy.deepcopy(leaf)  # has plain codes, as one that is not on the device
            weight = leaf.weight
            buffer = torch.empty(memory.vram_aligned_size(weight), dtype=torch.uint8)
            there = memory.interpret_gathered_like([weight], buffer)[0]
            there.copy_(weight)
            assert there._qdata.data_ptr() == buffer.data_ptr() and there._qdata.is_contiguous()
            assert torch.equal(leaf.integer_forward(x, there, leaf.bias), before)
            sums = leaf._sums[1]
            assert torch.equal(leaf.integer_forward(x, there, leaf.bias), before) and leaf._sums[1] is sums
        if there._qdata.dim() == 4:  # channels last: what the kernels for GPUs read as it is
            assert there._qdata.shape[-1] == leaf.geometry.shape[1]


def test_what_dynamic_loading_keeps_on_the_device_is_prepared_once(quantized, monkeypatch):
    """It hands the same object over at every call, `_v_weight`, as long as it lies there."""
    table, reference = patchers.module("tfmq.kernels.table"), patchers.module("tfmq.kernels.reference")
    monkeypatch.setattr(patchers.module("tfmq.runtime.leaf"), "pick", lambda *_: table.BACKENDS[-1])
    inner, count = reference.prepare, []
    monkeypatch.setattr(reference, "prepare", lambda *a: count.append(1) or inner(*a))
    for path in linear_and_conv(quantized):
        leaf = copy.deepcopy(patchers.leaves(quantized)[path])
        x = torch.randn(2, *_input(leaf))
        with torch.inference_mode():
            there, elsewhere = (leaf.weight.clone() for _ in range(2))
            expected = [leaf.integer_forward(x, there, leaf.bias) for _ in range(2)]
            assert len(count) == 2, "streamed in for one call"
            leaf._v_weight = there
            expected += [leaf.integer_forward(x, there, leaf.bias) for _ in range(3)]
            assert len(count) == 3
            leaf._v_weight = elsewhere
            expected += [leaf.integer_forward(x, elsewhere, leaf.bias) for _ in range(2)]
            assert len(count) == 4
        assert all(torch.equal(y, expected[0]) for y in expected)
        count.clear()


def test_the_tables_follow_the_input(base, calibration):
    """The host streams the parameters of a leaf that is not on the device, and leaves its buffers where they are."""
    found = set()
    for leaf in patchers.leaves(patchers.quantize(base, calibration, activations="static")).values():
        if leaf.tables.tensors:  # a per-token layer without balance has none
            leaf = copy.deepcopy(leaf)
            reading = leaf.reading
            leaf._bring_tables(torch.device("meta"))
            assert all(table.device.type == "meta" for table in leaf.tables.tensors.values())
            assert leaf.reading == reading
            found.add(leaf.geometry.is_conv)
    assert found == {False, True}


def test_what_dynamic_loading_puts_back_by_its_path_meets_no_leaf(base, quantized):
    """It notes all buffers of the network that it loads, and registers them again when other modules stand there."""
    expected = patchers.sample(quantized)
    noted = dict(quantized.model.named_buffers())
    assert not any(key.startswith(f"diffusion_model.{path}.") for path in patchers.leaves(quantized) for key in noted)
    patchers.weights(base)  # unloads: the float layers are there again
    before = fingerprint(base)
    for key, buffer in noted.items():
        comfy.utils.set_attr_buffer(base.model, key, buffer)
    assert fingerprint(base) == before
    assert torch.equal(patchers.sample(quantized), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_small_layers_stay_in_float_where_loading_is_dynamic(dynamic):
    model = nn.Module()
    model.diffusion_model = nn.ModuleDict({"small": nn.Linear(128, 256), "large": nn.Linear(128, 257)})
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    patcher.is_dynamic = lambda: dynamic
    assert list(patchers.module("tfmq.host.network").Network.of(patcher).keep) == (["small"] if dynamic else [])


def test_the_hosts_own_saving_says_what_to_use(base, quantized, saved_by_the_host):
    for patcher in (quantized, quantized.clone().clone()):
        with pytest.raises(TfmqError, match="TFMQ Save"):
            saved_by_the_host(patcher)
    assert saved_by_the_host(base).is_file()


def test_partial_unloading_gives_the_same_picture(quantized, monkeypatch):
    whole = patchers.sample(quantized)
    freed = quantized.partially_unload(quantized.offload_device, 6_000_000)
    assert freed > 6_000_000 * 0.9
    patchers.only(0, monkeypatch)
    assert torch.equal(patchers.sample(quantized), whole)
    patchers.weights(quantized)


def test_a_compiled_leaf_runs(quantized):
    for path in linear_and_conv(quantized):
        leaf = patchers.leaves(quantized)[path]
        x = torch.randn(2, *_input(leaf))
        with torch.no_grad():
            compiled = torch.compile(leaf, backend="eager", fullgraph=False)
            assert torch.equal(compiled(x), leaf(x))


def test_the_host_can_sample_at_other_sizes_and_batches(base, quantized):
    for start in (torch.zeros(2, 4, 8, 8), torch.zeros(1, 4, 12, 6)):
        error = patchers.distance(patchers.sample(quantized, start=start), patchers.sample(base, start=start))
        assert error < 0.06  # measured 0.02


def _input(leaf: nn.Module) -> tuple[int, ...]:
    return (leaf.in_channels, 6, 5) if "Conv2d" in type(leaf).__name__ else (3, leaf.in_features)


def test_a_leaf_that_moves_lets_go_of_what_was_prepared(quantized):
    before = patchers.sample(quantized)
    found = [leaf for leaf in patchers.leaves(quantized).values() if leaf.scheme.weight_bits == 8]
    assert found and all(leaf._prepared is not None for leaf in found)
    for leaf in found:
        leaf.to("cpu")
        assert leaf._prepared is None
    assert torch.equal(patchers.sample(quantized), before)
