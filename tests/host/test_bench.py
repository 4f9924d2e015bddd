"""The quality benchmark runs end to end on the demo checkpoint, and the host's formats are the host's."""

import json
import os
import subprocess
import sys

import pytest
import torch

from demo import checkpoint
from devkit import inprocess
from devkit.paths import ROOT

ENTRIES = {"float32", "ours_w8a8", "ours_w8a8_linear", "host_int8", "host_int8_convrot"}


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no strict JSON")


def _bench(*arguments: str) -> subprocess.CompletedProcess:
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    command = [sys.executable, "-m", "bench.quality", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_quality_writes_every_entry_of_both_variants(tmp_path):
    prompts, target = tmp_path / "prompts.txt", tmp_path / "new" / "quality.json"
    lines = (ROOT / "demo" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    prompts.write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")
    ran = _bench(
        "--checkpoint", str(checkpoint.ensure()), "--prompts", str(prompts), "--json", str(target),
        "--count", "2", "--steps", "3",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    result = json.loads(target.read_text(), parse_constant=_refuse)
    assert result["prompts"] == 2
    assert result["calibration_prompts"] == {"count": 2, "among_the_tested": False}
    assert result["outlier_variant"]["float32_psnr_db_against_checkpoint"] > 80
    for part in (result, result["outliers"]):
        assert set(part) >= ENTRIES
        assert part["float32"]["psnr_db"] is None and part["float32"]["ssim"] == 1
        for name in ENTRIES - {"float32"}:
            assert 20 < part[name]["psnr_db"] < 100, name
            assert 0 <= part[name]["adherence"] <= 1
            assert part[name]["bytes"] < part["float32"]["bytes"]
        assert part["ours_w8a8"]["bytes"] < part["ours_w8a8_linear"]["bytes"]
    # Two prompts of three steps calibrate little, but outliers must not hurt: that is what the balance is for.
    assert result["outliers"]["ours_w8a8"]["psnr_db"] > result["outliers"]["host_int8"]["psnr_db"]
    for name in ENTRIES:
        assert name in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--size", "63"], "multiple of 8"),
        (["--count", "0"], "positive"),
    ],
)
def test_bad_arguments_end_in_a_sentence(arguments, words):
    ran = _bench(*arguments)
    assert ran.returncode != 0
    assert words in ran.stderr and "Traceback" not in ran.stderr


def test_the_hosts_own_layers_compute_in_its_formats():
    inprocess.use_host()
    import comfy.ops

    from bench.host_formats import _int8_linear, rotation_of

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
            layer = _int8_linear(linear, rotated)
            assert isinstance(layer, comfy.ops.CastWeightBiasOp) and "MixedPrecisionOps" in type(layer).__qualname__
            assert layer.weight._qdata.dtype == torch.int8
            assert layer.weight._params.scale.numel() == 32
            assert layer.weight._params.convrot == rotated
            errors[rotated] = float((layer(x) - exact).norm() / exact.norm())
    assert 1e-5 < errors[True] < errors[False] < 0.5
