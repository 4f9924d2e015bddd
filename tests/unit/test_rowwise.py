"""Blocks of rows make what the whole makes."""

import pytest
import torch
from torch import nn

from tfmq.runtime.row_blocks import LEAST_ROWS, in_blocks

WIDE = 1 << 20  # entries per row, so that blocks are as short as they may be


@pytest.mark.parametrize("rows", [0, 1, LEAST_ROWS, 2 * LEAST_ROWS - 1, 2 * LEAST_ROWS, 2 * LEAST_ROWS + 7])
@pytest.mark.parametrize("batch", [(), (1,), (3,)])
def test_it_makes_what_the_whole_makes(rows, batch):
    calls = []
    layer = nn.Linear(4, 6).double()

    def function(x):
        calls.append(x.shape)
        return layer(x).relu()

    x = torch.randn(*batch, rows, 4, dtype=torch.float64)
    y = in_blocks(function, x, WIDE)
    assert y.shape == (*batch, rows, 6)
    torch.testing.assert_close(y, layer(x).relu(), rtol=1e-14, atol=1e-14)
    total = rows * (batch[0] if batch else 1)
    if total < 2 * LEAST_ROWS:
        assert calls == [x.shape]
    else:
        lengths = [shape[0] for shape in calls]
        assert len(lengths) == total // LEAST_ROWS and sum(lengths) == total
        assert max(lengths) - min(lengths) < len(lengths)


def test_narrow_layers_and_strided_inputs():
    x = torch.randn(2, 4, 9).transpose(1, 2)
    torch.testing.assert_close(in_blocks(torch.relu, x, 4), x.relu())
