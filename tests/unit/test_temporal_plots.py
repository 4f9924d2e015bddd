"""Plots of the temporal report."""

import pytest
import torch

from tfmq.report import temporal


def errors(layers: int = 3, intervals: int = 5) -> dict[str, dict[str, dict[str, list[float]]]]:
    values = {f"layer{i}": [10.0 ** -(i + j) for j in range(intervals)] for i in range(layers)}
    return {"relative L2 error": {"a": values, "b": values}, "cosine": {"a": values, "b": values}}


def test_curves_are_a_picture_that_shows_the_values() -> None:
    one = temporal.curves(errors(), [0.0, 1, 2, 3, 4])
    assert one.dim() == 3 and one.shape[2] == 3 and one.dtype == torch.float32
    assert float(one.min()) >= 0 and float(one.max()) <= 1 and float(one.std()) > 0.02
    other = errors()
    other["cosine"]["b"] = {name: [0.5] * 5 for name in other["cosine"]["b"]}
    assert not torch.equal(one, temporal.curves(other, [0.0, 1, 2, 3, 4]))


def test_an_error_of_zero_fits_on_the_logarithmic_axis() -> None:
    none = {"relative L2 error": {"exact": {"layer": [0.0] * 4}}}
    assert bool(torch.isfinite(temporal.curves(none, [0.0, 1, 2, 3])).all())


@pytest.mark.parametrize("layers", [2, 100])
def test_heat_map_leaves_unvisited_intervals_grey(layers: int) -> None:
    ranges = {f"layer{i}": [1.0, float("nan"), 2.0 + i] for i in range(layers)}
    picture = temporal.heat_map(ranges, [0.0, 500.0, 999.0])
    grey = (picture - 0.85).abs().amax(2) < 0.01
    assert float(grey.float().mean()) > 0.1
    full = {name: [1.0, 1.5, 2.0] for name in ranges}
    assert float(((temporal.heat_map(full, [0.0, 500.0, 999.0]) - 0.85).abs().amax(2) < 0.01).float().mean()) < 0.05


def test_missing_matplotlib_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert temporal.missing() is None
    monkeypatch.setattr(temporal.importlib.util, "find_spec", lambda name: None)
    assert "matplotlib" in str(temporal.missing())
