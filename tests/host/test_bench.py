"""The quality benchmark runs end to end on the demo checkpoint, and the host's formats are the host's."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from demo import checkpoint
from devkit import inprocess
from devkit.paths import ROOT
from tfmq.kernels import int8_product

FLOATS = {"float32", "float16"}
QUANTIZED = {
    "ours_w8a8", "ours_w4a16",
    "host_int8", "host_int8_convrot", "host_convrot_w4a4", "bitsandbytes_nf4",
}  # fmt: skip
ENTRIES = FLOATS | QUANTIZED
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes cannot be installed here"
)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no strict JSON")


def _bench(*arguments: str) -> subprocess.CompletedProcess:
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    command = [sys.executable, "-m", "bench.quality", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@needs_bitsandbytes
def test_quality_writes_every_entry_of_both_variants(tmp_path):
    prompts, target = tmp_path / "prompts.txt", tmp_path / "new" / "quality.json"
    lines = (ROOT / "demo" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    prompts.write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")
    ran = _bench(
        "--checkpoint", str(checkpoint.ensure()), "--prompts", str(prompts), "--json", str(target),
        "--count", "2", "--steps", "3", "--only", ",".join(sorted(ENTRIES - {"float32"})),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    result = json.loads(target.read_text(), parse_constant=_refuse)
    assert result["prompts"] == 2
    assert result["calibration_prompts"] == {"count": 2, "among_the_tested": False}
    assert result["outlier_variant"]["float32_psnr_db_against_checkpoint"] > 80
    for part in (result, result["outliers"]):
        assert set(part) >= ENTRIES
        assert part["float32"]["psnr_db"] is None and part["float32"]["ssim"] == 1
        assert part["float16"]["computes_in"] == "float32"
        assert part["float16"]["resident_bytes"] * 2 == part["float32"]["resident_bytes"]
        for name in ENTRIES:
            assert 0 <= part[name]["adherence"] <= 1
        for name in QUANTIZED:
            assert 10 < part[name]["psnr_db"] < 100, name
            assert part[name]["bytes"] < part["float16"]["bytes"]
            assert part[name]["bytes"] <= part[name]["resident_bytes"]
            assert part[name]["resident_bytes"] < part["float32"]["resident_bytes"]
        for name in ("host_int8", "host_int8_convrot", "host_convrot_w4a4", "bitsandbytes_nf4"):  # nothing kept twice
            assert part[name]["resident_bytes"] < part["float16"]["resident_bytes"]
        assert part["host_convrot_w4a4"]["bytes"] < part["host_int8"]["bytes"]
        # NF4 takes the temporal Linears as well.
        assert part["bitsandbytes_nf4"]["layers"] > part["host_convrot_w4a4"]["layers"] > 0
        assert part["ours_w4a16"]["bytes"] < 0.75 * part["ours_w8a8"]["bytes"]
    # Two prompts of three steps calibrate little, but outliers must not hurt: that is what the balance is for.
    assert result["outliers"]["ours_w8a8"]["psnr_db"] > result["outliers"]["host_int8"]["psnr_db"]
    # The checkpoint is in float16, its variant is not.
    assert result["float16"]["psnr_db"] is None and result["outliers"]["float16"]["psnr_db"] > 40
    for name in ENTRIES:
        assert name in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--size", "63"], "multiple of 8"),
        (["--count", "0"], "positive"),
        (["--only", "ours_w8a8,ours_w1a1"], "'ours_w1a1' is unknown"),
    ],
)
def test_bad_arguments_end_in_a_sentence(arguments, words):
    ran = _bench(*arguments)
    assert ran.returncode != 0
    assert words in ran.stderr and "Traceback" not in ran.stderr


def test_the_hosts_own_layers_compute_in_its_formats():
    if not int8_product._adds_exactly():
        pytest.skip("torch's int8 product, which the host's int8 takes, saturates on this processor")
    inprocess.use_host()
    import comfy.ops

    from bench.quality.host_formats import int8_linear, rotation_of

    assert [rotation_of(n) for n in (1280, 768, 320, 48, 20)] == [256, 256, 64, 16, None]
    torch.manual_seed(0)
    linear = torch.nn.Linear(320, 32)
    with torch.no_grad():
        linear.weight[:, 7] /= 50
        x = torch.randn(2, 5, 320)
        x[..., 7] *= 50  # an outlier channel, which the rotation spreads
        exact = linear(x)
        errors = {}
        for rotated in (False, True):
            layer = int8_linear(linear, rotated)
            assert isinstance(layer, comfy.ops.CastWeightBiasOp) and "MixedPrecisionOps" in type(layer).__qualname__
            assert layer.weight._qdata.dtype == torch.int8
            assert layer.weight._params.scale.numel() == 32
            assert layer.weight._params.convrot == rotated
            errors[rotated] = float((layer(x) - exact).norm() / exact.norm())
    assert 1e-5 < errors[True] < errors[False] < 0.5


def test_a_run_in_pieces_adds_to_its_own_file_only(tmp_path):
    from bench.quality import run

    about = {"prompts": 2, "torch": "2", "machine": "here"}
    given = argparse.Namespace(json=tmp_path / "q.json", only=["host_int8"], parts=None)
    assert run.merged(given, about) == about
    given.json.write_text(json.dumps(about | {"ours_w8a8": {"psnr_db": 30.0}}))
    assert run.merged(given, about | {"machine": "another"})["ours_w8a8"] == {"psnr_db": 30.0}
    with pytest.raises(ValueError, match="another prompts"):
        run.merged(given, about | {"prompts": 3})
    given.only = None
    assert run.merged(given, about) == about


def test_which_entries_a_mixed_plan_dominates():
    from bench.quality.makers import MIXED, dominated

    asked = []

    def measure(name, size):
        assert entries[name]["bytes"] == size
        asked.append(size)
        return None if size < 50 else {"bytes": size - 1, "psnr_db": size / 4}

    entries = {
        "small": {"bytes": 40, "psnr_db": 12.0},
        "worse": {"bytes": 60, "psnr_db": 14.0},
        "beaten by the last": {"bytes": 61, "psnr_db": 14.5},
        "better": {"bytes": 90, "psnr_db": 30.0},
        "exact": {"bytes": 200, "psnr_db": None},
        "float16": {"bytes": 210, "psnr_db": None},
        MIXED: {"bytes": 100, "psnr_db": 26.0},
    }
    found = dominated(entries, measure)
    assert asked == [40, 60, 90, 200]
    assert {name for name, one in found.items() if one["dominated"]} == {"worse", "beaten by the last"}
    assert found["small"] == {"bytes": 40, "mixed_bytes": None, "mixed_psnr_db": None, "dominated": False}
    assert found["beaten by the last"]["mixed_bytes"] == 59
    assert found["exact"]["mixed_psnr_db"] == 50 and not {MIXED, "float16"} & set(found)
    assert dominated(entries | {MIXED: {"bytes": 150, "psnr_db": None}}, measure)["exact"]["dominated"]


def test_the_hosts_4_bit_layer_and_what_it_cannot_take():
    inprocess.use_host()
    from bench.quality.host_formats import _w4a4_linear

    torch.manual_seed(0)
    linear = torch.nn.Linear(320, 32)
    with torch.no_grad():
        x = torch.randn(2, 5, 320)
        layer = _w4a4_linear(linear)
        assert "MixedPrecisionOps" in type(layer).__qualname__
        assert layer.weight._qdata.numel() == 320 * 32 // 2 and layer.weight._params.convrot_groupsize == 64
        error = float((layer(x) - linear(x)).norm() / linear(x).norm())
    assert 0.05 < error < 0.4


@needs_bitsandbytes
def test_nf4_is_that_of_bitsandbytes():
    from bitsandbytes.nn import Linear4bit

    inprocess.use_host()
    from bench.quality.host_formats import Nf4Linear

    torch.manual_seed(0)
    linear, x = torch.nn.Linear(128, 48), torch.randn(2, 5, 128)
    theirs = Linear4bit(128, 48, quant_type="nf4")
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")  # this is what makes it round
    with torch.no_grad():
        mine = Nf4Linear(linear)
        y = mine(x)
        exact, wanted = linear(x), theirs(x).float()
    assert float((y - wanted).norm() / wanted.norm()) < 0.01  # theirs may compute in bfloat16
    assert 0.03 < float((y - exact).norm() / exact.norm()) < 0.15
    assert sum(b.nbytes for b in mine.buffers()) < 128 * 48 * 4.25 / 8 + 8


def test_resident_bytes_counts_what_is_held_and_nothing_twice():
    from bench.quality.host_formats import resident_bytes, stored_bytes
    from support import patchers

    base = patchers.load()
    network = base.model.diffusion_model
    assert resident_bytes(base) == sum(p.nbytes for p in network.parameters())
    with patchers.files_in(Path(tempfile.mkdtemp())):
        quantized = patchers.quantize(base, patchers.calibrate(base))
    before = resident_bytes(quantized)
    patchers.sample(quantized)
    after = resident_bytes(quantized)
    # oneDNN packs the weights of all layers once more; nothing else is kept.
    codes = sum(leaf.weight._qdata.nbytes for leaf in patchers.leaves(quantized).values())
    assert stored_bytes(quantized) <= before <= after <= before + 1.1 * codes
    assert after > before


def test_seconds_in_a_real_comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures, calibration and quantization of a network that is small enough to wait for."""
    from bench.speed import host, unet

    small = unet.Config(8, (1,), (1,), 1, 768, None, False, 0, blocks=1)
    monkeypatch.setitem(unet.CONFIGS, "sd15", small)
    monkeypatch.setattr(host, "PROMPTS", 2)
    monkeypatch.setattr(host, "STEPS", 2)
    with torch.inference_mode():
        found = host.end_to_end("sd15", torch.device("cpu"))
    assert (found["prompts"], found["steps"]) == (2, 2)
    from support import patchers

    narrow = patchers.module("tfmq.host.faster.precision").fast_bfloat16()
    kinds = ["float", "bf16", "ours_w8a8", "ours_w8a8_bf16"] if narrow else ["float", "ours_w8a8"]
    assert list(found["picture_s"]) == kinds and ("ratio_bf16" in found) == narrow
    assert min(*found["picture_s"].values(), found["calibrate_s"], found["quantize_s"], found["generations"]) > 0
