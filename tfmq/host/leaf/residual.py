"""A LoRA beside an integer weight: y = kernel(x, W_q) + x dW^T, with dW kept in float and never rounded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...geometry import Geometry


@dataclass(frozen=True)
class Residual:
    """dW = up @ down, or `down` alone as the full dW where `up` is None.

    Linear: down [r, K], up [N, r]. Conv2d: down [r, C, kh, kw], up [N, r, 1, 1]. All factors are merged into `up` (or
    the full dW). `rows`: first output channel and count that the delta covers, or None for all of them.
    """

    down: Tensor
    up: Tensor | None = None
    rows: tuple[int, int] | None = None
    channels: int = 0

    def to(self, device: torch.device) -> Residual:
        if self.down.device == device:
            return self
        return replace(self, down=self.down.to(device), up=None if self.up is None else self.up.to(device))

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + (0 if self.up is None else self.up.nbytes)

    def linear(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in x's dtype."""
        y = F.linear(x, self.down.to(x.device, x.dtype))
        if self.up is not None:
            y = F.linear(y, self.up.to(x.device, x.dtype))
        if self.rows is not None:
            first, count = self.rows
            y = F.pad(y, (first, self.channels - first - count))
        return y

    def conv2d(self, x: Tensor, g: Geometry) -> Tensor:
        """x [B, C, H, W] -> [B, N, H', W'], in x's dtype."""
        groups = g.groups if self.up is None else 1
        y = F.conv2d(x, self.down.to(x.device, x.dtype), None, g.stride, g.padding, g.dilation, groups)
        return y if self.up is None else F.conv2d(y, self.up.to(x.device, x.dtype))
