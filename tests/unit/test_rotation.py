"""Hadamard rotation, and layers that use it."""

import pytest
import torch

from tfmq.decide import rotation_of
from tfmq.kernels.geometry import Geometry
from tfmq.leaf import QuantLinear
from tfmq.observe import LayerObserver
from tfmq.rotation import group_of, rotate
from tfmq.scheme import DYNAMIC, Scheme
from tfmq.solve import solve_layer
from tfmq.timeline import Clock, Partition, TimeAxis


@pytest.mark.parametrize(("channels", "group"), [(320, 64), (1280, 256), (48, 16), (24, 0), (7, 0), (16, 16)])
def test_block_is_the_largest_power_of_two_that_divides(channels: int, group: int) -> None:
    assert group_of(channels) == group


@pytest.mark.parametrize("group", [16, 64, 256])
def test_rotation_is_orthogonal_symmetric_and_stays_in_its_block(group: int) -> None:
    x = torch.randn(5, 2 * group, dtype=torch.float64)
    y = rotate(x, group)
    torch.testing.assert_close(rotate(y, group), x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    one = torch.zeros(1, 2 * group, dtype=torch.float64)
    one[0, 3] = 1
    spread = rotate(one, group)[0]
    assert float(spread[:group].abs().max()) == pytest.approx(group**-0.5) == float(spread[:group].abs().min())
    assert not spread[group:].any()


def observed(loud: float) -> tuple[torch.nn.Linear, LayerObserver, torch.Tensor]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 24)
    x = torch.randn(200, 64)
    x[torch.arange(200), torch.randint(64, (200,))] *= loud  # another channel in every row: no balance can mend it
    observer = LayerObserver(layer, 1)
    for _ in range(2):
        observer.observe(x, 0)
        if observer.histogram is None:
            observer.end_first_stage(layer.weight)
    return layer, observer, x


@pytest.mark.parametrize("balanced", [False, True])
def test_rotated_layer_is_more_precise_and_dequantizes(balanced: bool) -> None:
    layer, observer, x = observed(40.0)
    statistics = observer.statistics()
    assert statistics is not None and rotation_of(statistics) == 64
    if balanced:
        object.__setattr__(statistics, "balance", torch.rand(64) + 0.5)
    clock = Clock(TimeAxis(0, 1), Partition.uniform(1))
    error = {}
    for rotation in (0, 64):
        scheme = Scheme(activation=DYNAMIC, balanced=balanced, rotation=rotation)
        state = solve_layer(scheme, statistics, layer.weight, "mse")
        leaf = QuantLinear(state, Geometry((24, 64)), clock, layer.bias)
        exact = layer(x).detach()
        error[rotation] = float((leaf(x).detach() - exact).norm() / exact.norm())
        assert float((leaf.dequantize() - layer.weight).norm() / layer.weight.norm()) < 0.01
    assert error[64] < 0.75 * error[0]


def test_even_input_is_not_rotated() -> None:
    statistics = observed(1.0)[1].statistics()
    assert statistics is not None and rotation_of(statistics) == 0
