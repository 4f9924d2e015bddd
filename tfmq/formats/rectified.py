"""AdaRound's variable of how a weight is rounded (2004.10568, eq. 23): h(alpha) = clip(WIDTH sigmoid(alpha) - MARGIN,
0, 1). It reaches 0 and 1 at finite alpha."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH, MARGIN = 1.2, 0.1  # the paper's zeta - gamma and -gamma


def rectified(alpha: Tensor) -> Tensor:
    """h of alpha, float, same shape."""
    return (torch.sigmoid(alpha) * WIDTH - MARGIN).clamp(0, 1)


def alpha_of(h: Tensor) -> Tensor:
    """The inverse, for h in [0, 1]."""
    return torch.logit((h + MARGIN) / WIDTH)
