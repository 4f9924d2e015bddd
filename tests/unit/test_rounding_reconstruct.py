"""The driver of reconstruction on a small network: better than nearest, resumable, bounded, and it leaves no trace."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.rounding import four_bit_layers
from tfmq.errors import TfmqError
from tfmq.formats import int4
from tfmq.geometry import Geometry
from tfmq.rounding.adaround import Settings
from tfmq.rounding.layer import Layer, Rows
from tfmq.rounding.reconstruct import Result, reconstruct
from tfmq.rounding.samples import Source
from tfmq.scheme import DYNAMIC, STATIC, Scheme

ROWS, INTERVALS = 64, 3
SHORT = Settings(iterations=60, scale_iterations=15, batch=8, rate=2e-2)


class Mixed(nn.Module):
    """A convolution and two Linear layers around a residual stream that it writes in place, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 32)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        assert options["scale"].shape[0] == x.shape[0]
        x = x + self.conv(torch.relu(self.norm(x))) * options["scale"].view(-1, 1, 1, 1)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens.contiguous()
        normed = torch.nn.functional.layer_norm(tokens, (32,))
        tokens += self.down(torch.relu(self.up(normed)))
        return tokens.transpose(1, 2).view(x.shape)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 32, 1)
        self.blocks = nn.ModuleList([Mixed(), Mixed()])
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, {"scale": scale})
        return self.head(x.mean((2, 3)))


PLAN = {
    "blocks.0.conv": STATIC, "blocks.0.up": DYNAMIC, "blocks.0.down": STATIC, "blocks.1.conv": STATIC,
    "blocks.1.up": DYNAMIC, "blocks.1.down": DYNAMIC, "head": STATIC,
}  # fmt: skip


class Case:
    """A network, its layers as the driver wants them, and samples."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = Network().requires_grad_(False)
        self.x = torch.randn(ROWS, 4, 4, 4) * torch.linspace(0.5, 2, ROWS).view(-1, 1, 1, 1)
        self.scale = torch.linspace(0.5, 1.5, ROWS)
        self.passes = 0
        index = torch.arange(ROWS)
        self.rows = Rows(index * INTERVALS // ROWS, index % 2)
        self.source = Source(self.run, self.rows.interval, self.rows.branch, (index // 8).tolist(), ["all"] * ROWS)

    def run(self, indices: list[int]) -> Tensor:
        self.passes += 1
        return self.network(self.x[indices], self.scale[indices])

    def layers(self) -> dict[str, Layer]:
        return four_bit_layers(self.network, PLAN, lambda: self.run(list(range(ROWS))), INTERVALS)

    def solve(self, preset: str, settings: Settings | None = None, **options: Any) -> Result:
        def weight(path: str) -> Tensor:
            return self.network.get_parameter(f"{path}.weight").float()

        return reconstruct(
            self.network, self.layers(), weight, self.source, preset, device=torch.device("cpu"), settings=settings,
            **options,
        )  # fmt: skip

    def error(self, result: Result) -> float:
        """Relative error of the output with the rounded weights (activations in float)."""
        wanted = self.run(list(range(ROWS)))
        before = {path: self.network.get_parameter(f"{path}.weight").clone() for path in PLAN}
        for path, rounded in result.layers.items():
            weight = self.network.get_parameter(f"{path}.weight")
            weight.copy_(int4.from_columns(int4.values(rounded.codes, rounded.grid), tuple(weight.shape)))
        found = self.run(list(range(ROWS)))
        for path, weight in before.items():
            self.network.get_parameter(f"{path}.weight").copy_(weight)
        return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def case() -> Case:
    return Case()


def same(one: Result, other: Result) -> bool:
    return one.layers.keys() == other.layers.keys() and all(
        torch.equal(one.layers[p].codes, other.layers[p].codes)
        and all(torch.equal(a, b) for a, b in zip(one.layers[p].grid[:3], other.layers[p].grid[:3], strict=True))
        for p in one.layers
    )


def untouched(network: nn.Module) -> bool:
    return not any("forward" in module.__dict__ for module in network.modules()) and not any(
        thread.name == "tfmq lane" for thread in threading.enumerate()
    )


def test_each_preset_is_nearer_than_the_one_before(case: Case) -> None:
    nearest, fast = case.solve("nearest"), case.solve("fast")
    case.passes = 0
    balanced = case.solve("balanced", SHORT)
    # Once through the network per batch for the float twin and once for the quantized one; a probe, and `layers`.
    assert case.passes == 2 * (ROWS // 7) + 2
    errors = [case.error(result) for result in (nearest, fast, balanced)]
    assert errors[1] < 0.8 * errors[0] and errors[2] < errors[0]
    assert set(balanced.layers) == set(PLAN) and set(balanced.losses) == {"blocks.0", "blocks.1", "head"}
    assert all(end <= start for start, end in balanced.losses.values())
    assert any(end < start for start, end in balanced.losses.values())
    assert fast.layers["head"].note == "error feedback" and untouched(case.network)


def test_inside_of_inference_mode(case: Case) -> None:
    outside = case.solve("balanced", SHORT)
    with torch.inference_mode():
        again = Case()
        again.layers = case.layers  # type: ignore[method-assign]
        assert same(again.solve("balanced", SHORT), outside)
    assert not any(p.requires_grad for p in again.network.parameters())


class Interrupted(BaseException):
    pass


def stop_after(share: float) -> Callable[[int, int, float], None]:
    def tell(done: int, total: int, left: float) -> None:
        assert 0 <= done <= total and left >= 0
        if done > share * total:
            raise Interrupted

    return tell


def test_an_interrupt_leaves_no_trace_and_the_next_run_goes_on(case: Case, tmp_path: Path) -> None:
    weights = {key: value.clone() for key, value in case.network.state_dict().items()}
    whole = case.solve("balanced", SHORT)
    with pytest.raises(Interrupted):
        case.solve("balanced", SHORT, folder=tmp_path, progress=stop_after(0.6))
    assert untouched(case.network)
    assert all(torch.equal(value, weights[key]) for key, value in case.network.state_dict().items())
    kept = list(tmp_path.iterdir())
    assert len(kept) == 1 and kept[0].suffix == ".safetensors"

    shares: list[float] = []
    done = case.solve("balanced", SHORT, folder=tmp_path, progress=lambda d, t, _: shares.append(d / t))
    assert same(done, whole) and done.losses == whole.losses
    assert shares[0] > 0.4 and shares[-1] == 1

    case.passes = 0
    assert same(case.solve("balanced", SHORT, folder=tmp_path), whole) and case.passes == 1  # that of `layers`


def test_damaged_checkpoints_are_made_again(case: Case, tmp_path: Path) -> None:
    whole = case.solve("balanced", SHORT, folder=tmp_path)
    next(iter(sorted(tmp_path.iterdir()))).write_bytes(b"no")
    assert same(case.solve("balanced", SHORT, folder=tmp_path), whole)


def test_a_reconstruction_that_diverges_is_not_taken(case: Case) -> None:
    wild = Settings(iterations=10, scale_iterations=0, batch=8, rate=50.0, regularizer=0.0)
    result = case.solve("balanced", wild)
    start_alone = case.solve("balanced", dataclasses.replace(wild, iterations=0))
    assert all("error feedback kept, reconstruction diverged" in one.note for one in result.layers.values())
    assert same(result, start_alone)
    start, end = result.losses["blocks.0"]
    assert end == start


def test_the_budget_is_kept_or_refused(case: Case) -> None:
    whole = case.solve("balanced", SHORT)
    budget = 1_200_000
    less = case.solve("balanced", SHORT, budget=budget)
    assert whole.rows == 63 and 8 <= less.rows < 40 and 0 < less.peak_bytes <= budget
    with pytest.raises(TfmqError, match=r"needs at least .* GB"):
        case.solve("balanced", SHORT, budget=1000)


def test_too_few_samples(case: Case) -> None:
    case.source = Source(case.run, case.rows.interval[:5], case.rows.branch[:5], [0] * 5, ["all"] * 5)
    with pytest.raises(TfmqError, match=r"holds 5 samples .* at least 8"):
        case.solve("fast")


def test_a_layer_that_never_runs_is_rounded_to_nearest(case: Case) -> None:
    case.network.blocks[1].down.forward = case.network.blocks[1].down.forward  # an override of somebody else's
    kept = case.network.blocks[1].down.__dict__["forward"]
    case.network.spare = nn.Linear(32, 32)
    layers = case.layers()
    layers["spare"] = Layer(Scheme(4, 8, DYNAMIC, group=16), Geometry((32, 32)))
    case.layers = lambda: layers  # type: ignore[method-assign]
    result = case.solve("fast")
    weight = case.network.spare.weight
    assert torch.equal(result.layers["spare"].codes, int4.nearest(weight, result.layers["spare"].grid))
    assert "did not run" in result.layers["spare"].note
    assert case.network.blocks[1].down.__dict__["forward"] is kept
