"""Samples of model calls: the choice is balanced, bounded, and comes back from its file as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tfmq import files
from tfmq.observe.calibration import Calibration
from tfmq.observe.samples import Collector, Samples
from tfmq.timeline import Partition, TimeAxis


def offered(collector: Collector, calls: int, intervals: int = 4) -> Samples:
    texts = [torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    generator = torch.Generator().manual_seed(7)
    for call in range(calls):
        # The first interval comes far more often than the others.
        interval = 0 if call % 3 else call % intervals
        x = torch.randn(2, 4, 2, 2, generator=generator)
        text = torch.stack([texts[call % 3], torch.zeros(3, 5)])
        conditions = {"c_crossattn": text, "flag": True}
        collector.offer(x, torch.tensor([0.5 + interval]).expand(2), interval, (0, 1), call // 5, conditions)
    return collector.samples()


def test_the_choice_is_even_over_intervals_and_branches() -> None:
    samples = offered(Collector(limit=16), 90)
    assert len(samples.rows) == 16
    cells = [(row.interval, row.branch) for row in samples.rows]
    assert all(cells.count(cell) == 2 for cell in {(i, b) for i in range(4) for b in range(2)})
    assert {row.sigma for row in samples.rows} == {0.5, 1.5, 2.5, 3.5}


def test_equal_tensors_are_held_once_and_bytes_stay_within_the_limit() -> None:
    collector = Collector(limit=64)
    samples = offered(collector, 90)
    texts = {id(row.conditions["c_crossattn"]) for row in samples.rows}
    assert len(texts) == 4
    held = sum(row.x.nbytes for row in samples.rows) + 4 * 3 * 5 * 4
    assert collector.nbytes == held

    small = Collector(limit=64, most=600)
    few = offered(small, 90)
    assert 0 < len(few.rows) < 20 and small.nbytes <= 600
    assert few.skipped["the samples are full"] > 0


def test_calls_that_cannot_be_replayed_are_counted() -> None:
    collector = Collector()
    x, sigma = torch.zeros(2, 4, 2, 2), torch.ones(2)
    collector.offer(x, sigma, 0, (0, 1), 0, {"odd": object()})
    collector.offer(x, sigma, 0, (0, 1), 0, {"y": torch.zeros(1, 3)})
    collector.offer(x, sigma, 0, (0, 1, 0), 0, {})
    assert collector.samples() == Samples(
        (), {"odd is a object": 1, "y is not one tensor per picture": 1, "latents of several sizes": 1}
    )


def test_round_trip_through_a_calibration_file(tmp_path: Path) -> None:
    samples = offered(Collector(limit=12), 40)
    calibration = Calibration("m", "s", TimeAxis(0, 999), Partition.uniform(4), {}, {}, samples)
    files.write_calibration(tmp_path / "c.safetensors", calibration)
    back = files.read_calibration(tmp_path / "c.safetensors").samples
    assert back is not None and len(back.rows) == 12 and back.skipped == samples.skipped
    for one, other in zip(samples.rows, back.rows, strict=True):
        assert torch.equal(one.x, other.x) and one.conditions["flag"] is other.conditions["flag"] is True
        text, again = one.conditions["c_crossattn"], other.conditions["c_crossattn"]
        assert isinstance(text, torch.Tensor) and isinstance(again, torch.Tensor)
        assert torch.equal(text, again.float())
        assert (one.sigma, one.interval, one.branch, one.run) == (other.sigma, other.interval, other.branch, other.run)
    x, sigma, conditions = back.batch([0, 5])
    assert x.shape == (2, 4, 2, 2) and sigma.tolist() == [back.rows[0].sigma, back.rows[5].sigma]
    assert conditions["c_crossattn"].shape == (2, 3, 5) and conditions["flag"] is True


def test_a_calibration_without_samples_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration("m", "s", TimeAxis(0, 999), Partition.uniform(4), {}, {})
    monkeypatch.setattr(files, "VERSION", 1)
    files.write_calibration(tmp_path / "old.safetensors", calibration)
    monkeypatch.undo()
    assert files.read_calibration(tmp_path / "old.safetensors").samples is None
