"""What TFMQ Quantize says about the backends that the layers got, on machines that are not here."""

from dataclasses import replace

import pytest

from support import patchers

summary, swap = patchers.module("tfmq.host.summary"), patchers.module("tfmq.host.quantized")
install, table = patchers.module("tfmq.kernels.install"), patchers.module("tfmq.kernels.table")
pytestmark = pytest.mark.usefixtures("folder")


def lines(quantized, **changes) -> list[str]:
    return summary.text(replace(quantized.attachments["tfmq"], **changes)).splitlines()


def test_every_backend_of_the_record_is_explained(quantized):
    backends = {
        "conv2d_static": {"triton_int_mm": 3, "float_conv": 1},
        "linear_dynamic": {"kitchen": 1},
        "linear_static": {"triton_int_mm": 2, "float_product": 4, "reference": 1},
    }
    reasons = {"triton": "the GPU is older than compute capability 8.0", "triton_int_mm": "few channels"}
    text = lines(quantized, backends=backends, passed_over=reasons)
    start = text.index("conv2d_static runs on: triton_int_mm (3 layers), float_conv (1 layer)")
    assert text[start + 1].startswith("  triton_int_mm: PyTorch's int8 product")
    assert text[start + 2].startswith("  float_conv: computes in the model's float type")
    assert text[start + 4].startswith("  kitchen: int8 kernels that come with ComfyUI")
    assert text[start + 7].startswith("  float_product: computes in the model's float type")
    assert text[start + 8] == "  reference: not worth it here for speed: the reference backend is exact but slow"
    assert "  triton passed over: the GPU is older than compute capability 8.0" in text
    assert "  triton_int_mm passed over by other layers: few channels" in text


def test_what_to_install_is_said(quantized, monkeypatch):
    asked = []

    def advice(device, backends):
        asked.append(backends)
        return "install something"

    monkeypatch.setattr(install, "advice", advice)
    clone = quantized.clone()
    record = clone.attachments["tfmq"]
    swap.attach(clone, record, clone.size)
    assert "install something" in summary.text(clone.attachments["tfmq"]).splitlines()
    assert asked == [record.backends]


def test_every_backend_that_is_not_the_best_has_a_note():
    assert {name for name, note in summary.NOTES.items() if not note} == {"onednn", "triton", "int_mm"}
    assert summary.NOTES.keys() == {backend.name for backend in table.BACKENDS}
