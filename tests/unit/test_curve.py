"""Curves over the time axis in place of weights."""

import pytest
import torch

from bench.temporal.error import layer_functions
from support.temporal import AXIS, small_graph
from tfmq.errors import TfmqError
from tfmq.temporal import curve
from tfmq.temporal.curve import GRID, LOW_RANK, ROWS, Curve, fit
from tfmq.timeline import TimeAxis


def worst(found, truth):
    return max(float(((found[p] - truth[p]).norm(dim=1) / truth[p].norm(dim=1)).max()) for p in truth)


@pytest.fixture(scope="module")
def layers():
    return layer_functions(small_graph())


def test_the_stated_error_is_the_measured_one(layers):
    made = fit(layers, AXIS, discrete=True, points=200)
    t = torch.arange(200.0)
    truth = {p: f(t) for p, f in layers.items()}
    assert worst(made.at(t), truth) == pytest.approx(made.worst_error, rel=1e-4)
    assert made.worst_error <= curve.TOLERANCE
    good = [x["bytes"] for x in made.trials if x["worst_error"] <= curve.TOLERANCE]
    assert made.nbytes <= min(good) * 1.01


def test_a_smooth_curve_gets_a_small_grid():
    t_scale = torch.linspace(0.1, 1.0, 64)
    layers = {"a": lambda t: torch.sin(t.unsqueeze(1) / 50 * t_scale) + 2}
    made = fit(layers, TimeAxis(0.0, 199.0), discrete=False, points=200)
    assert made.kind in (GRID, LOW_RANK) and made.nbytes < 2 * 200 * 64
    t = torch.rand(50, generator=torch.Generator().manual_seed(1)) * 199
    assert worst(made.at(t), {"a": layers["a"](t)}) <= 1.5 * curve.TOLERANCE


def test_a_wild_discrete_curve_keeps_its_rows():
    noise = torch.randn(200, 300, generator=torch.Generator().manual_seed(2))
    layers = {"a": lambda t: noise[t.round().long().clamp(0, 199)]}
    made = fit(layers, AXIS, discrete=True, points=200)
    assert made.kind == ROWS
    t = torch.tensor([0.0, 17.0, 199.0])
    assert torch.equal(made.at(t)["a"], noise[t.long()].half().float())


def test_low_rank_of_a_low_rank_curve():
    base = torch.randn(3, 2000, generator=torch.Generator().manual_seed(4))
    noise = torch.randn(200, 3, generator=torch.Generator().manual_seed(5))
    layers = {"a": lambda t: noise[t.round().long().clamp(0, 199)] @ base}
    made = fit(layers, AXIS, discrete=True, points=200)
    assert made.kind == LOW_RANK and made.coefficients.shape == (200, 4)


def test_saved_and_back(layers):
    made = fit(layers, AXIS, discrete=False, points=100)
    back = Curve.from_tensors(made.manifest(), made.tensors())
    t = torch.tensor([0.0, 3.3, 150.5, 199.0])
    assert all(torch.equal(back.at(t)[p], rows) for p, rows in made.at(t).items())
    with pytest.raises(TfmqError, match="damaged"):
        Curve.from_tensors({}, made.tensors())


def test_outside_of_the_axis_is_refused(layers):
    made = fit(layers, AXIS, discrete=True, points=200)
    with pytest.raises(TfmqError, match="outside"):
        made.at(torch.tensor([250.0]))


def test_an_interrupt_passes_through(layers):
    def progress(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(layers, AXIS, discrete=True, points=100, progress=progress)
