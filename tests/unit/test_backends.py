"""Which backend a layer gets on which machine, and what a person is told: machines that are not here, as far as the
table asks."""

import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from tfmq.geometry import Geometry
from tfmq.kernels import install, kitchen, rates, table, trial
from tfmq.kernels.rates import Passes
from tfmq.kernels.table import CONV2D_STATIC, LINEAR_DYNAMIC, LINEAR_STATIC, costs_of, pick, refusals
from tfmq.kernels.triton import backend as triton_backend
from tfmq.kernels.triton import int_mm as triton_int_mm

GPU = torch.device("cuda")
NARROW, SQUARE, WIDE = Geometry((320, 320)), Geometry((1280, 1280)), Geometry((10240, 1280))
THREE, ONE = Geometry((640, 640, 3, 3), padding=(1, 1)), Geometry((1280, 1280, 1, 1))
FIRST, GROUPED = Geometry((320, 4, 3, 3), padding=(1, 1)), Geometry((640, 80, 3, 3), padding=(1, 1), groups=8)
CACHED = (
    triton_backend.missing, triton_int_mm.missing, rates.no_int8, rates.rates, table.pick,
)  # fmt: skip
Card = Callable[..., None]
NOT_THERE = "Triton is not installed"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    def put(
        name: str = "NVIDIA GeForce RTX 2060", capability: tuple[int, int] = (7, 5), triton: str | None = None,
        ours: str | None = NOT_THERE, hip: str | None = None, tried: str | None = None,
    ) -> None:  # fmt: skip
        """triton, ours: why Triton and comfy_kitchen cannot be used. tried: what came of trying a small layer."""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(triton_backend, "unusable", lambda: triton)
        monkeypatch.setattr(kitchen, "unusable", lambda: ours)
        monkeypatch.setattr(trial, "fault", lambda name, *_, **__: None if name == "triton" else tried)
        clear()

    yield put
    clear()


def clear() -> None:
    for cached in CACHED:
        cached.cache_clear()


def got(geometry: Geometry, operation: str | None = None, device: torch.device = GPU) -> str:
    return pick(operation or (CONV2D_STATIC if geometry.is_conv else LINEAR_STATIC), device, geometry).name


def test_turing_with_triton(card: Card) -> None:
    card()
    assert got(SQUARE) == got(WIDE) == got(SQUARE, LINEAR_DYNAMIC) == "triton_int_mm"
    assert got(THREE) == got(ONE) == "triton_int_mm"
    assert got(NARROW) == "float_product" and got(FIRST) == "float_conv"
    assert got(GROUPED) == "float_conv"
    reasons = refusals(LINEAR_STATIC, GPU, NARROW)
    assert list(reasons) == ["onednn", "triton", "triton_int_mm", "kitchen", "int_mm", "float_conv"]
    assert "8.0" in reasons["triton"] and "longer than it saves" in reasons["triton_int_mm"]
    assert refusals(CONV2D_STATIC, GPU, GROUPED)["triton_int_mm"] == "grouped convolution"
    # where float16 is added up at full rate, an integer product saves less
    card(name="Tesla T4")
    assert got(SQUARE) == "float_product"
    assert got(ONE) == "float_conv" and got(Geometry((1280, 5120))) == got(THREE) == "triton_int_mm"


def test_what_a_trial_refuses_is_given_on(card: Card) -> None:
    card(tried="cannot compile here: no C compiler", ours=None)
    assert got(SQUARE) == "float_product" and got(THREE) == "float_conv"
    reasons = refusals(LINEAR_STATIC, GPU, SQUARE)
    assert "no C compiler" in reasons["triton_int_mm"] and "no C compiler" in reasons["kitchen"]


@pytest.mark.parametrize(
    ("name", "capability"),
    [("NVIDIA GeForce GTX 1660 SUPER", (7, 5)), ("Quadro T1000", (7, 5)), ("Tesla V100-SXM2-16GB", (7, 0)),
     ("NVIDIA GeForce GTX 1080", (6, 1))],
)  # fmt: skip
def test_cards_without_int8_tensor_cores(card: Card, name: str, capability: tuple[int, int]) -> None:
    card(name, capability, ours=None)
    for geometry in (NARROW, SQUARE, WIDE):
        assert got(geometry) == "float_product"
    assert got(THREE) == got(ONE) == "float_conv"
    assert "tensor cores" in refusals(LINEAR_STATIC, GPU, SQUARE)["triton_int_mm"]


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 4090"])
def test_a_newer_card_without_triton(card: Card, name: str) -> None:
    card(name, (8, 9), triton=NOT_THERE, ours=None)
    assert got(SQUARE) == got(WIDE) == got(WIDE, LINEAR_DYNAMIC) == "kitchen"
    assert got(SQUARE, LINEAR_DYNAMIC) == got(NARROW) == "float_product"
    assert got(THREE) == got(ONE) == "float_conv"
    assert got(Geometry((1280, 1284))) == "float_product"  # would be padded at every call
    reasons = refusals(LINEAR_STATIC, GPU, SQUARE)
    assert reasons["triton"] == NOT_THERE and "itself" in reasons["triton_int_mm"]
    card(name, (8, 9), triton=NOT_THERE)
    assert got(SQUARE) == got(WIDE) == "float_product"
    card(name, (8, 9), ours=None)
    assert got(SQUARE) == got(NARROW) == got(THREE) == "triton"


@pytest.mark.parametrize("capability", [(9, 4), (11, 0)])
def test_amd(card: Card, capability: tuple[int, int]) -> None:
    card("AMD Radeon RX 7900 XTX", capability, hip="6.4", ours=None)
    assert got(SQUARE) == got(NARROW) == "float_product" and got(THREE) == got(GROUPED) == "float_conv"
    assert "AMD" in refusals(LINEAR_STATIC, GPU, SQUARE)["int_mm"]


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_devices(card: Card, kind: str) -> None:
    card(triton=NOT_THERE)
    device = torch.device(kind)
    assert got(SQUARE, device=device) == "float_product" and got(THREE, device=device) == "float_conv"
    assert kind in refusals(LINEAR_STATIC, device, SQUARE)["int_mm"]


def test_nothing_changes_on_a_cpu(card: Card) -> None:
    card()
    cpu = torch.device("cpu")
    for geometry in (NARROW, SQUARE, WIDE, THREE, ONE, FIRST):
        assert got(geometry, device=cpu) in {"onednn", "int_mm"}
    assert got(GROUPED, device=cpu) == "reference"
    for name in ("triton_int_mm", "kitchen", "float_conv", "float_product"):
        backend = next(b for b in table.BACKENDS if b.name == name)
        assert all(backend.refuse(o, cpu, WIDE) for o in (LINEAR_STATIC, LINEAR_DYNAMIC, CONV2D_STATIC))


def test_the_time_model(card: Card) -> None:
    """By hand, for a GeForce card of Turing: 90 operations a byte, int8 four times as fast, so that three quarters of
    2 N K operations are saved."""
    card()
    passes = Passes(2.0, 8.0, 2.0)
    # N = K: 1.5 K K > 90 * 10 K from K = 600 on
    assert rates.slower(GPU, Geometry((592, 592)), passes) and rates.slower(GPU, Geometry((608, 608)), passes) is None
    # 3 x 3, N = C: 13.5 C C > 90 * (2 + 8 + 18) C from C = 187 on
    for c, expected in ((184, False), (192, True)):
        assert (rates.slower(GPU, Geometry((c, c, 3, 3), padding=(1, 1)), passes) is None) == expected
    # stride 2: four pixels are quantized per output, 90 * (8 + 8 + 18): from 227 on
    for c, expected in ((224, False), (232, True)):
        strided = Geometry((c, c, 3, 3), (2, 2), (1, 1))
        assert (rates.slower(GPU, strided, passes) is None) == expected
    assert rates.slower(GPU, SQUARE, Passes(0.0, 0.0)) is None


def test_the_plan_counts_the_time_of_most_layers(card: Card) -> None:
    card()
    costs = {b.name: b.costs for b in table.BACKENDS}
    assert costs_of(GPU, [NARROW, SQUARE, SQUARE, THREE]) == costs["triton_int_mm"]
    assert costs_of(GPU, [NARROW, NARROW, SQUARE]) == costs["float_product"]
    assert costs_of(torch.device("cpu"), []) == pick(LINEAR_DYNAMIC, torch.device("cpu"), SQUARE).costs


# --- what to install ------------------------------------------------------------------------------------------------


def advice(*names: str, device: torch.device = GPU) -> str:
    return install.advice(device, {LINEAR_STATIC: dict.fromkeys(names, 1)})


def test_triton_is_named_where_it_would_help(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    card(name="NVIDIA GeForce RTX 4090", capability=(8, 9), triton=NOT_THERE, ours=None)
    for system, package in (("win32", "pip install triton-windows)"), ("linux", "pip install triton)")):
        monkeypatch.setattr(sys, "platform", system)
        said = advice("kitchen", "float_conv")
        assert package in said and NOT_THERE in said and len(said.splitlines()) == 1
    assert advice("triton") == ""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    card(name="NVIDIA GeForce RTX 4090", capability=(8, 9), triton=NOT_THERE, ours="switched off")
    assert "CUDA 13" in advice("float_product").splitlines()[1]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert len(advice("float_product").splitlines()) == 1


def test_nothing_is_named_where_nothing_would_help(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    card()
    assert advice("triton_int_mm", "float_product") == ""  # Triton is there
    card(name="NVIDIA GeForce GTX 1650", triton=NOT_THERE)
    assert advice("float_product") == ""
    card(hip="6.4", triton=NOT_THERE)
    assert advice("float_product") == ""
    assert advice("float_product", device=torch.device("mps")) == ""
    assert advice("onednn", "int_mm", device=torch.device("cpu")) == ""
    monkeypatch.delattr(torch, "_int_mm")
    assert "newer PyTorch" in advice("reference", device=torch.device("cpu"))
