"""Which rotation a layer gets, chosen on samples of its input and its weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.affine import channel_scale, dequantize_weight, quantize_rows, quantize_weight
from ..formats.hadamard import _blocks, rotate
from ..formats.int4 import group_for, nearest, search_grid, values

OUTPUTS = 32  # rows of a weight that its error is measured on


GROUP = 32  # of 4-bit weights there


PERMUTATION_WORTHWHILE = 0.8  # ratio of squared errors below which a kind with (more) permutations is taken


def find_permutations(rows: Tensor, reach: Tensor, group: int) -> Tensor | None:
    """P1 and P2, [2, K], int16 where that holds them; None where one block is all.

    rows: a sample of the input, float [M, K]. reach [K]: its channels' largest magnitudes, from all that was seen.
    """
    channels = reach.numel()
    if channels == group:
        return None
    first = zigzag(reach, group)
    second = zigzag(_blocks(rows[:, first], group).abs().amax(0), group)
    return torch.stack([first, second]).to(torch.int16 if channels <= 2**15 else torch.int32)


def zigzag(reach: Tensor, group: int) -> Tensor:
    """Permutation int64 [K] that deals the channels out to the blocks, widest first, in turns of changing direction."""
    turns = reach.argsort(descending=True, stable=True).view(group, -1)
    turns[1::2] = turns[1::2].flip(1)
    return turns.t().flatten()


def choose_rotation(rows: Tensor, reach: Tensor, weight: Tensor, group: int) -> tuple[Tensor | None, Tensor]:
    """Which kind of rotation leaves the least error of a per-token input, and what it does to the weight.

    rows: a sample of the balanced input, float [M, K]. reach [K]: its channels' largest magnitudes. weight [N, K]: the
    one that it meets. Returns the permutations, or None for H alone, and `weight_errors` without and with this
    rotation, float64 [2, 2].
    """
    weight = weight[:: -(-weight.shape[0] // OUTPUTS)].float()
    plain = weight_errors(rows, weight)
    found, least, errors = None, float("inf"), plain
    both = find_permutations(rows, reach, group)
    for permutations in (None,) if both is None else (None, both[:1], both):
        x, w = rotate(rows, group, permutations), rotate(weight, group, permutations)
        codes, scale, offset = quantize_rows(x)
        error = float((codes * scale + offset - x).square().sum())
        # A permutation is a gather at every call: it must pay for itself.
        if error < least * (1.0 if permutations is None else PERMUTATION_WORTHWHILE):
            found, least, errors = permutations, error, weight_errors(x, w)
    return found, torch.stack([plain, errors])


def weight_errors(rows: Tensor, weight: Tensor) -> Tensor:
    """Squared output error from rounding the weight to 8 and to 4 bits, float64 [2].

    rows float [M, K], weight float [N, K]. It is divided by what an error of the input as large as the input would make
    if it had no direction, so that it compares with the relative squared error of an input.
    """
    scale = channel_scale(weight)
    eight = dequantize_weight(quantize_weight(weight, scale), scale)
    grid = search_grid(weight, group_for(weight.shape[1], GROUP))
    four = values(nearest(weight, grid), grid)
    unit = weight.double().square().sum() * rows.double().square().mean() * rows.shape[0]
    made = torch.stack([(rows @ (rounded - weight).t()).double().square().sum() for rounded in (eight, four)])
    return made / unit.clamp_min(1e-30)
