"""Whatever is wrong ends in one clear sentence, and nothing is lost or half done."""

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch

from support import patchers, tiny

import comfy.model_management  # isort: skip
import comfy.model_patcher  # isort: skip
import comfy.samplers  # isort: skip
import comfy.sd  # isort: skip
from comfy.patcher_extension import WrappersMP  # isort: skip
from comfy.quant_ops import QuantizedTensor  # isort: skip

files = patchers.module("tfmq.files")
store = patchers.module("tfmq.host.store")
pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture(scope="module")
def saved(quantized):
    return store.save(quantized, "tfmq/whole")


def refused(text, function, *arguments, **options):
    """The call ends with one sentence of our own that says this."""
    with pytest.raises(patchers.TfmqError, match=text) as failure:
        function(*arguments, **options)
    message = str(failure.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 400
    return message


def untouched(patcher, run):
    """Run something that fails, and check that the MODEL is as before."""
    before, hooks = patchers.weights(patcher), count_hooks(patcher)
    wrappers, patches = dict(patcher.wrappers), dict(patcher.object_patches)
    run()
    assert count_hooks(patcher) == hooks
    assert (patcher.wrappers, patcher.object_patches) == (wrappers, patches)
    after = patchers.weights(patcher)
    assert all(torch.equal(after[key], before[key]) for key in before)


def count_hooks(patcher):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in patcher.model.modules())


# --- MODELs that cannot be worked on


class NotAModel:
    model = None


@pytest.mark.parametrize("thing", [NotAModel(), None, "a string", torch.nn.Linear(2, 2)])
def test_not_a_model(thing, calibration):
    refused("not a diffusion MODEL: connect the MODEL output", patchers.calibrate, thing)
    refused("not a diffusion MODEL: connect the MODEL output", patchers.quantize, thing, calibration)


def test_the_patcher_of_another_kind_of_network(calibration):
    class Encoder(torch.nn.Module):
        device = torch.device("cpu")

    clip = comfy.model_patcher.ModelPatcher(Encoder(), torch.device("cpu"), torch.device("cpu"))
    refused("not a diffusion MODEL", patchers.calibrate, clip)
    refused("not a diffusion MODEL", patchers.quantize, clip, calibration)


def test_a_model_that_is_quantized_already(quantized, calibration):
    refused("already quantized by TFMQ: connect the one that goes into", patchers.quantize, quantized, calibration)
    refused("already quantized by TFMQ", patchers.calibrate, quantized)


def test_a_model_in_the_hosts_own_int8(calibration, tmp_path):
    tensors, prefix = {}, "diffusion_model."
    for key, weight in patchers.load().model.state_dict().items():
        if not key.startswith(prefix):
            continue
        key, layer = key.removeprefix(prefix), key.removeprefix(prefix).removesuffix(".weight")
        if key.endswith("attn1.to_q.weight"):
            whole = QuantizedTensor.from_float(weight, "TensorWiseINT8Layout", per_channel=True)
            tensors |= {key: whole._qdata, f"{layer}.weight_scale": whole._params.scale}
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
        else:
            tensors[key] = weight
    with torch.inference_mode():
        native = comfy.sd.load_diffusion_model_state_dict(tensors)
    text = refused("This MODEL is already quantized", patchers.calibrate, native)
    assert "TensorWiseINT8Layout" in text and "to_q" in text
    refused("already quantized .*load the 16-bit version", patchers.quantize, native, calibration)


def test_a_model_in_float8():
    patcher = patchers.load(tiny.FLUX, dtype=torch.float8_e4m3fn)
    inputs = {"positives": {"positive0": patchers.conditioning(1, tiny.FLUX)}, "latent": latent16()}
    refused("already quantized .float8_e4m3fn in layer", patchers.calibrate, patcher, **inputs)


def test_a_compiled_model(base, calibration):
    compiled = base.clone()
    compiled.add_object_patch("diffusion_model", torch.compile(base.model.diffusion_model, backend="eager"))
    refused("compiled: put torch.compile behind TFMQ Quantize", patchers.quantize, compiled, calibration)
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    wrapped = base.clone()
    set_torch_compile_wrapper(wrapped, backend="eager")
    refused("compiled: put torch.compile behind TFMQ Quantize", patchers.quantize, wrapped, calibration)
    refused("compiled: put torch.compile behind TFMQ Quantize", patchers.calibrate, wrapped)


# --- what is calibrated on


@pytest.mark.parametrize("prompts", ["", "  \n\t\n "])
def test_empty_prompts(base, prompts):
    refused(
        "prompts are empty: type at least one", patchers.calibrate, base, positives={}, prompts=prompts, clip=Clip()
    )


def test_prompts_without_a_clip(base):
    refused("prompts but no CLIP: connect", patchers.calibrate, base, positives={}, prompts="a cat")


def test_neither_prompts_nor_conditionings(base):
    refused("prompts are empty.*or connect CONDITIONINGs", patchers.calibrate, base, positives={})


def test_no_negative_where_one_is_needed(base):
    text = refused(
        "no negative conditioning: connect one, or a CLIP, or set cfg to 1", patchers.calibrate, base, cfg=4.5
    )
    assert "4.5" in text


def test_no_sigmas(base):
    guider = comfy.samplers.CFGGuider(base)
    guider.set_conds(patchers.conditioning(1), patchers.conditioning(2))
    execute = patchers.nodes.CalibrateCustom.execute
    for sigmas in (torch.tensor([]), torch.tensor([1.0])):
        refused(
            "sigmas hold no step", execute, Noise(), guider, comfy.samplers.ksampler("euler"), sigmas, patchers.latent()
        )


class Clip:
    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, _):
        return patchers.conditioning(0)


class Noise:
    seed = 0

    def generate_noise(self, latent):
        return torch.randn(latent["samples"].shape)


def latent16():
    return {"samples": torch.zeros(1, 16, 8, 8), "downscale_ratio_spacial": 8}


# --- calibrations that do not fit


def test_a_calibration_of_another_model(calibration):
    other = patchers.load(tiny.SD15_TWO_LEVEL)
    refused("belongs to another model.*connect the same MODEL", patchers.quantize, other, calibration)


def test_a_calibration_without_the_lora_of_the_model(base, calibration):
    from support import loras

    path = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    lora = loras.kohya({path: base.model.get_submodule(f"diffusion_model.{path}").weight.shape})
    refused("with other LoRAs", patchers.quantize, loras.apply(base, lora, 1.0), calibration)
    with_lora = loras.apply(base, lora, 0.5)
    handle = patchers.calibrate(with_lora)
    refused("with other LoRAs", patchers.quantize, loras.apply(base, lora, 0.6), handle)
    refused("with other LoRAs", patchers.quantize, base, handle)
    patchers.quantize(loras.apply(base, lora, 0.5), handle)


def test_a_calibration_of_another_kind_of_sampling(base, calibration):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    other = ModelSamplingDiscrete().patch(base, "v_prediction", False)[0]
    text = refused("another kind of sampling", patchers.quantize, other, calibration)
    assert "V_PREDICTION" in text and "EPS" in text
    assert patchers.calibrate(other).path != calibration.path


def test_a_calibration_that_was_deleted(base):
    handle = patchers.calibrate(base, seed=123)
    os.remove(handle.path)
    refused("no longer in .*run the node that wrote it again", patchers.quantize, base, handle)
    assert patchers.calibrate(base, seed=123) == handle
    patchers.quantize(base, handle)


@pytest.mark.parametrize("damage", ["cut", "emptied", "foreign"])
def test_a_damaged_calibration_is_made_again(base, damage):
    handle = patchers.calibrate(base, seed=124)
    whole = Path(handle.path).read_bytes()
    spoil(Path(handle.path), damage)
    refused("cut off|not written by TFMQ", patchers.quantize, base, handle)
    patchers.calibrate(base, seed=124)
    assert Path(handle.path).read_bytes() == whole


def test_a_layer_that_calibration_never_saw_stays_in_float(base, calibration):
    import dataclasses

    found = calibration.load()
    path = next(p for p, s in found.layers.items() if s.kind == "linear" and p.endswith("to_q"))
    layers = {key: value for key, value in found.layers.items() if key != path}
    partial = Path(calibration.path).with_name("partial.safetensors")
    files.write_calibration(partial, dataclasses.replace(found, layers=layers))
    output = patchers.nodes.Quantize.execute(base, type(calibration)(str(partial)), "W8A8").args
    assert path not in patchers.leaves(output[0])
    assert output[0].attachments["tfmq"].plan.left[path] == "the calibration never saw it run"
    assert "left in float: 1 layer, the calibration never saw it run" in output[1]
    assert json.loads(output[2])["left"]["the calibration never saw it run"] == 1
    assert torch.isfinite(patchers.sample(output[0])).all()


# --- numbers


def test_weights_that_are_not_a_number(base):
    broken = patchers.load()
    path = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    with torch.no_grad():
        broken.model.get_submodule(f"diffusion_model.{path}").weight[0, 0] = float("nan")

    def run():
        text = refused("received NaN or infinite values", patchers.calibrate, broken)
        assert text.startswith("Layer input_blocks.1.1.transformer_blocks.0.attn1.")

    run()
    assert count_hooks(broken) == 0 and not broken.wrappers.get(WrappersMP.APPLY_MODEL)


def test_a_weight_that_became_infinite_after_calibration(calibration):
    broken = patchers.load()
    path = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    weight = broken.model.get_submodule(f"diffusion_model.{path}").weight
    with torch.no_grad():
        weight[1, 1] = float("inf")  # not among the entries that identify the model
    refused(f"Layer {path} cannot be quantized.*load an intact copy", patchers.quantize, broken, calibration)


# --- files


def spoil(path, damage):
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1)}, path)


def with_manifest(source, target, **changed):
    """A copy of a file of ours with another manifest."""
    whole = source.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["tfmq"]) | changed
    header["__metadata__"]["tfmq"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("cut", "not a complete safetensors file .*get or make it again"),
        ("emptied", "not a complete safetensors file"),
        ("foreign", "was not written by TFMQ: choose a file made by TFMQ Save"),
    ],
)
def test_a_damaged_model_file(saved, damage, text):
    path = saved.with_name(f"{damage}.safetensors")
    path.write_bytes(saved.read_bytes())
    spoil(path, damage)
    message = refused(text, patchers.nodes.Load.execute, f"tfmq/{path.name}")
    assert path.name in message
    path.unlink()


def test_a_file_of_a_newer_version(saved):
    path = saved.with_name("newer.safetensors")
    with_manifest(saved, path, version=files.NEWEST + 1)
    refused(
        "newer.safetensors was written by a newer TFMQ.*update the node pack",
        patchers.nodes.Load.execute,
        "tfmq/newer.safetensors",
    )
    path.unlink()


@pytest.mark.parametrize("missing", ["plan", "axis", "kinds", "bytes"])
def test_a_manifest_that_lacks_something(saved, missing):
    path = saved.with_name("lacks.safetensors")
    with_manifest(saved, path, **{missing: None})
    refused("does not hold what its manifest says", patchers.nodes.Load.execute, "tfmq/lacks.safetensors")
    path.unlink()


def test_a_tensor_that_is_missing(saved):
    path = saved.with_name("lacks.safetensors")
    tensors, manifest = files.read_tensors(saved), files.read_manifest(saved, files.MODEL)
    layer = next(key for key in tensors if key.endswith(".weight_scale"))
    files.write(path, {k: v for k, v in tensors.items() if k != layer}, manifest)
    refused(
        "lacks the scale of layer.*get or make the file again", patchers.nodes.Load.execute, "tfmq/lacks.safetensors"
    )
    path.unlink()


def test_a_calibration_in_the_place_of_a_model(saved, calibration):
    path = saved.with_name("calibration.safetensors")
    path.write_bytes(Path(calibration.path).read_bytes())
    refused(
        "holds a calibration, but a model is wanted here", patchers.nodes.Load.execute, "tfmq/calibration.safetensors"
    )
    path.unlink()


def test_a_model_file_that_is_gone():
    refused("no longer in .*choose another file", patchers.nodes.Load.execute, "tfmq/gone.safetensors")
    assert "choose a file made by TFMQ Save" in patchers.nodes.Load.validate_inputs("tfmq/gone.safetensors")


def test_save_wants_a_quantized_model(base):
    refused("not quantized by TFMQ: connect the output of TFMQ Quantize", patchers.nodes.Save.execute, base, "x")


# --- a full disk


def full_disk(*_arguments, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(tensors, path, metadata=None):
    Path(path).write_bytes(b"half")
    full_disk()


@pytest.mark.parametrize("failure", [full_disk, half_written])
def test_a_full_disk_while_saving(quantized, saved, monkeypatch, failure):
    whole, picture = saved.read_bytes(), patchers.sample(quantized)
    before = sorted(p.name for p in saved.parent.iterdir())
    monkeypatch.setattr(files, "save_file", failure)
    refused("Could not write .*no space left.*free some space", patchers.nodes.Save.execute, quantized, "tfmq/whole")
    assert sorted(p.name for p in saved.parent.iterdir()) == before
    assert saved.read_bytes() == whole
    assert torch.equal(patchers.sample(quantized), picture)


def test_a_full_disk_while_calibrating(base, folder, monkeypatch):
    place = folder / "tfmq_calibrations"
    before = sorted(p.name for p in place.iterdir())
    monkeypatch.setattr(files, "save_file", half_written)
    untouched(base, lambda: refused("Could not write .*no space left", patchers.calibrate, base, seed=77))
    assert sorted(p.name for p in place.iterdir()) == before
    monkeypatch.undo()
    assert patchers.calibrate(base, seed=77)


# --- interrupt


@pytest.mark.parametrize("call", [0, 4])
def test_an_interrupt_in_the_sampler_leaves_nothing_behind(base, monkeypatch, folder, call):
    calibrate = patchers.module("tfmq.host.calibrate")
    picture = patchers.sample(base)
    calls = []

    def interrupt(self, place):
        def report(*_):
            calls.append(place)
            if len(calls) > call:
                raise comfy.model_management.InterruptProcessingException

        return report

    monkeypatch.setattr(calibrate._Progress, "callback", interrupt)
    before = sorted(p.name for p in (folder / "tfmq_calibrations").iterdir())

    def run():
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            patchers.calibrate(base, seed=200 + call)

    untouched(base, run)
    assert len(calls) == call + 1
    assert sorted(p.name for p in (folder / "tfmq_calibrations").iterdir()) == before
    monkeypatch.undo()
    assert torch.equal(patchers.sample(base), picture)
    patchers.quantize(base, patchers.calibrate(base, seed=200 + call))


def test_an_interrupt_while_quantizing(base, calibration, quantized):
    picture = patchers.sample(quantized)

    def run():
        comfy.model_management.interrupt_current_processing(True)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            patchers.quantize(base, calibration)
        assert not comfy.model_management.processing_interrupted()

    untouched(base, run)
    assert torch.equal(patchers.sample(patchers.quantize(base, calibration)), picture)


def test_an_interrupt_while_saving(quantized, saved):
    before = sorted(p.name for p in saved.parent.iterdir())
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        patchers.nodes.Save.execute(quantized, "tfmq/whole")
    assert sorted(p.name for p in saved.parent.iterdir()) == before
