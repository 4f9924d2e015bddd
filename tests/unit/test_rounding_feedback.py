"""Error feedback: nearer than rounding to nearest, by the recursion of its paper, in any column order."""

from __future__ import annotations

import torch

from tfmq.formats import int4
from tfmq.rounding.gptq4 import DAMPINGS, Gram, block_width, feedback, input_columns


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) + 2
    return torch.randn(rows, columns, generator=generator) @ mix * torch.linspace(0.2, 1, columns)


def gram_of(x: torch.Tensor, limit: int = 4096) -> Gram:
    gram = Gram(x.shape[1], x.device, limit)
    for part in x.split(100):
        gram.add(part)
    return gram


def test_beats_nearest_on_the_output() -> None:
    x = correlated(400, 64)
    w = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    gram = gram_of(x)
    grid = int4.search_grid(w, 32, gram.mean_square)
    codes, place = feedback(w, grid, gram)
    nearest = int4.values(int4.nearest(w, grid), grid)
    found = int4.values(codes, grid)
    error, plain = ((x @ (q - w).t()).square().sum() for q in (found, nearest))
    assert error < 0.3 * plain
    assert torch.equal(place.round(), codes.float())
    assert torch.isclose(torch.tensor(gram.error(found - w)), error / 400, rtol=1e-3)
    assert torch.allclose(gram.mean_square, x.square().mean(0), rtol=1e-4)


def test_equals_the_recursion_written_out() -> None:
    """Eq. 2 and 3 of GPTQ: after each column the inverse of H loses it, and the rest is moved by its error."""
    x = correlated(200, 32, seed=3)
    w = torch.randn(3, 32, generator=torch.Generator().manual_seed(4))
    gram = gram_of(x)
    grid = int4.search_grid(w, 16)
    size = int4.step(grid).double()
    zero = grid.zero.double().repeat_interleave(16, 1)
    h = (gram.blocks[0] / gram.blocks[0].diagonal().mean()).double() + DAMPINGS[0] * torch.eye(32).double()
    inverse, moved, wanted = torch.linalg.inv(h), w.double().clone(), torch.zeros(3, 32)
    for k in gram.blocks[0].diagonal().argsort(descending=True).tolist():
        code = (moved[:, k] / size[:, k] + zero[:, k]).round().clamp(0, 15)
        wanted[:, k] = code
        error = (moved[:, k] - (code - zero[:, k]) * size[:, k]) / inverse[k, k]
        moved -= error.unsqueeze(1) * inverse[k]
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        inverse[k, :] = inverse[:, k] = 0
        inverse[k, k] = 1
    codes, _ = feedback(w, grid, gram)
    assert torch.equal(codes.float(), wanted)


def test_wide_weights_in_blocks() -> None:
    assert block_width(5760, 4096) == 2880 and block_width(4096, 4096) == 4096 and block_width(96, 40) == 32
    x = correlated(400, 96)
    w = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    gram = gram_of(x, limit=40)
    assert gram.blocks.shape == (3, 32, 32)
    grid = int4.search_grid(w, 32)
    codes, _ = feedback(w, grid, gram)
    alone, _ = feedback(w[:, 32:64], int4.Grid(grid.scale, grid.factor[:, 1:2], grid.zero[:, 1:2], 32),
                        gram_of(x[:, 32:64]))  # fmt: skip
    assert torch.equal(codes[:, 32:64], alone)


def test_dead_inputs_and_a_single_sample_are_no_trouble() -> None:
    w = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    grid = int4.search_grid(w, 32)
    for x in (torch.zeros(3, 32), torch.randn(1, 32, generator=torch.Generator().manual_seed(2))):
        codes, place = feedback(w, grid, gram_of(x))
        assert codes.max() <= 15 and bool(torch.isfinite(place).all())


def test_columns_of_a_convolution_are_in_the_order_of_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 7, 5, generator=generator)
    w = torch.randn(8, 6, 3, 2, generator=generator)
    columns = input_columns(x, ((3, 2), (2, 1), (1, 0), (1, 2)))
    y = torch.nn.functional.conv2d(x, w, stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    ours = (columns @ int4.to_columns(w).t()).view(2, y.shape[2], y.shape[3], 8).permute(0, 3, 1, 2)
    assert torch.allclose(ours, y, atol=1e-4)
