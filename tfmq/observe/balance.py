"""Channel balancing: move outliers of single input channels into the weight.

x W^T = (x / s) (W * s)^T for any positive vector s over the input channels. The quantization of an activation suffers
from its widest channel, that of a weight row from its largest entry; s trades one for the other (SmoothQuant,
2211.10438, eq. 4). The division costs nothing here: it is merged into the factor of the quantize step.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXPONENTS = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
# The error of a weight is the same at every step of a run and adds up, that of an activation changes sign from step to
# step and averages out: over 20 steps their squares count about 20 to 1.
WEIGHT_SHARE = 16.0
WORTHWHILE = 0.4  # below this ratio of expected squared errors a balance is applied


def choose_balance(low: Tensor, high: Tensor, mean_square: Tensor, weight: Tensor) -> Tensor | None:
    """The balance vector with the least expected output error, or None where none is worth it.

    low, high: least and greatest input per interval and channel, [I, K]; intervals that were not visited hold +inf and
    -inf. mean_square [K]: mean of x^2 per channel. weight [N, K, ...]. Returns s, float32 [K], geometric mean 1.
    """
    if weight.shape[1] != low.shape[1]:
        return None  # a grouped convolution: one column of the weight stands for several channels
    visited = torch.isfinite(low).all(1) & torch.isfinite(high).all(1)
    low, high = low[visited].double().clamp_max(0), high[visited].double().clamp_min(0)
    w = weight.detach().double().flatten(2) if weight.dim() > 2 else weight.detach().double().unsqueeze(2)
    column_peak = w.abs().amax(dim=(0, 2))
    column_energy = w.square().sum(dim=(0, 2))
    peak_per_entry = w.abs().amax(dim=2)
    taps = w.shape[2]
    reach = torch.maximum(-low, high).amax(0)
    alive = (reach > 0) & (column_peak > 0)
    if not bool(alive.any()):
        return None

    def expected_error(s: Tensor) -> Tensor:
        span = (high / s).amax(1) - (low / s).amin(1)
        activation = (span / 255).square().mean() / 12 * (column_energy * s.square()).sum()
        rows = (peak_per_entry * s).amax(1) / 127
        weights = rows.square().sum() / 12 * taps * (mean_square.double() / s.square()).sum()
        return activation + WEIGHT_SHARE * weights

    plain = expected_error(torch.ones_like(reach))
    best, best_error = None, plain * WORTHWHILE
    for exponent in EXPONENTS:
        for against_weight in (0.0, 1.0 - exponent):
            s = torch.ones_like(reach)
            s[alive] = reach[alive].pow(exponent) / column_peak[alive].pow(against_weight)
            s[alive] = s[alive] / s[alive].log().mean().exp()
            error = expected_error(s)
            if error < best_error:
                best, best_error = s, error
    return None if best is None else best.float()
