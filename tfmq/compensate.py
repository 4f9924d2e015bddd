"""Rounding of a weight to 8 bits that makes up for its own error on a sample of the layer's input.

The error of a weight is the same at every step of a run and adds up (`balance.WEIGHT_SHARE`), so at 8 bits it outweighs
that of the input. The columns of the weight are rounded one after another, each from where it best makes up for the
error D of those before it on the sample X [R, K]: the minimum of || X D^T ||^2 + d || D ||^2 over the columns that are
left. That is GPTQ (2210.17323, section 3) with H = X^T X + d I. As R is small against K the matrices here are of R
columns, not of K:

    w_k <- w_k - x_k^T (d I + sum over j >= k of x_j x_j^T)^-1 u,    u = sum over j < k of x_j D_j
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantizer import INT8_MAX, channel_scale, per_channel, quantize_weight

DAMPING = 0.1  # d over the mean of the diagonal of X^T X: the columns' directions that the sample does not show
BLOCK = 32


def round_to_8_bits(weight: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scale of a weight: `compensated` where there is a sample, else nearest. Arguments: there."""
    scale = channel_scale(weight)
    return (quantize_weight(weight, scale) if rows is None else compensated(weight, scale, rows)), scale


def compensated(weight: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """weight [N, K, ...] float, scale float32 [N] -> int8 codes [N, K, ...] as `quantizer.quantize_weight`.

    rows: a sample of what the weight is multiplied by, float [R, K'] in the order of `weight.flatten(1)`.
    """
    nearest = quantize_weight(weight, scale)
    rows = rows.double().cpu()
    unit = rows.square().sum(0).mean()
    if not bool(unit > 0):
        return nearest
    rows = rows / unit.sqrt()
    # The columns with the most energy first, when the most others are left to help.
    order = rows.square().sum(0).argsort(descending=True)
    x = rows[:, order].t().contiguous()
    pull = _pull(x).float().to(weight.device)
    x, order = x.float().to(weight.device), order.to(weight.device)
    columns = (weight.detach().flatten(1).float() / per_channel(scale, 2)).t()[order].contiguous()
    found = torch.empty_like(columns)
    made = torch.zeros(x.shape[1], columns.shape[1], device=weight.device)  # u, for every output channel
    for start in range(0, columns.shape[0], BLOCK):
        part = slice(start, min(start + BLOCK, columns.shape[0]))
        here, ahead = columns[part], columns[part] - pull[part] @ made
        coupling = pull[part] @ x[part].t()
        for i in range(here.shape[0]):
            torch.clamp(ahead[i].round(), -INT8_MAX, INT8_MAX, out=found[start + i])
            if i + 1 < here.shape[0]:
                ahead[i + 1 :].addr_(coupling[i + 1 :, i], found[start + i] - here[i], alpha=-1)
        made.addmm_(x[part].t(), found[part] - here)
    codes = torch.empty_like(found)
    codes[order] = found
    return codes.t().to(torch.int8).reshape(weight.shape)


def _pull(x: Tensor) -> Tensor:
    """x float64 [K, R] -> row k: (d I + sum over j >= k of x_j x_j^T)^-1 x_k, float64 [K, R]."""
    inverse = torch.eye(x.shape[1], dtype=x.dtype) / DAMPING
    out = torch.empty_like(x)
    for k in range(x.shape[0] - 1, -1, -1):  # Sherman and Morrison, from the last column on
        grown = inverse @ x[k]
        out[k] = grown / (1 + x[k] @ grown)
        inverse.addr_(grown, out[k], alpha=-1)
    return out
