"""What the kernels have to give, in float64, and how far rounding to float32 and to the result's type may take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.gpu.case import Wrong
from tfmq.geometry import Geometry, StaticInput
from tfmq.kernels.triton.launch import Rows

ROUNDING = 2.0**-24  # of float32, relative
# Of a code before it is rounded: three roundings to float32 of numbers up to 255 + 255.
CODE_SLACK = 3 * 510 * ROUNDING
# The norms add thousands of float32 values; their own tests allow 2e-4 + 1e-4 * |value|, which is up to 0.05 of a step
# of the grids here.
NORM_SLACK = 0.05
PRODUCT_ROUNDINGS = 7  # of the epilogue: conversion, scales, offset, bias, with one to spare


class Judge:
    """Raises Wrong where something is further off than it may be. `worst`: how much of what is allowed was needed, at
    most (1.0: all), by what was judged."""

    silent = False

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}

    def static_codes(
        self, what: str, q: Tensor, value: Tensor, grid: StaticInput, slack: float = CODE_SLACK, pad: int = 0
    ) -> None:
        """q int8 [..., C'] against value float64 [..., C] of the same places; pad: rows and columns of border of q,
        an image [B, H, W, C'] then, that hold the zero point, as the channels from C on do."""
        if self.silent:
            return
        zero = grid.zero_point.double()
        inner = q[:, pad : q.shape[1] - pad, pad : q.shape[2] - pad] if pad else q
        c = value.shape[-1]
        factor = 1 / grid.scale.double() if grid.inverse_balance is None else grid.inverse_balance.double() / grid.scale
        # A position beyond the grid's ends is the end.
        place = (value * factor + zero).clamp(0, 255)
        self._bound(what, (inner[..., :c].double() + 128 - place).abs(), torch.full_like(place, 0.5 + slack))
        rest = int((inner[..., c:].double() + 128 != zero).sum())
        if pad:
            rest += int((q.double() + 128 != zero).sum()) - int((inner.double() + 128 != zero).sum())
        if rest:
            raise Wrong(f"{what}: {rest} codes of border or padding are not the zero point")

    def rows(self, what: str, rows: Rows, value: Tensor, bits: int) -> None:
        """Rows of `quantize_rows` against value float64 [M, K]."""
        if self.silent:
            return
        half, k = 2 ** (bits - 1), value.shape[1]
        low, high = value.amin(1), value.amax(1)
        scale, offset = rows.scale.double(), rows.offset.double()
        size = torch.maximum(low.abs(), high.abs())
        near = 6 * ROUNDING * size + 2.0**-100  # balanced, subtracted, divided
        self._bound(f"{what}, scale", (scale - (high - low) / (2 * half - 1)).abs(), near / (2 * half - 1) + 2.0**-100)
        self._bound(f"{what}, offset", (offset - (low + half * scale)).abs(), near + 4 * ROUNDING * half * scale)
        codes = rows.codes[:, :k].double()
        if int((codes < -half).sum() + (codes >= half).sum() + (rows.codes[:, k:] != 0).sum()):
            raise Wrong(f"{what}: a code beyond {bits} bits, or none where there is no channel")
        off = (offset[:, None] + scale[:, None] * codes - value).abs()
        self._bound(
            what, off, ((0.5 + CODE_SLACK) * scale + near + 4 * ROUNDING * half * scale)[:, None].expand_as(off)
        )

    def product(
        self, what: str, y: Tensor, acc: Tensor, sums: Tensor, scale: Tensor, grid: StaticInput | None,
        rows: Rows | None, bias: Tensor | None,
    ) -> None:  # fmt: skip
        """y [M, N] in its type against acc, exact in float64 [M, N], with the scales and the bias applied.

        sums float64 [N] of the weight's codes, scale float32 [N]; grid or rows says what the activations' codes mean.
        """
        if self.silent:
            return
        if grid is not None:
            truth = (acc - (grid.zero_point.double() - 128) * sums) * grid.scale.double() * scale.double()
            size = truth.abs()
        else:
            assert rows is not None
            parts = acc * rows.scale.double()[:, None] * scale.double(), rows.offset.double()[:, None] * sums * scale
            truth, size = parts[0] + parts[1], parts[0].abs() + parts[1].abs()
        if bias is not None:
            truth, size = truth + bias.double(), size + bias.double().abs()
        kind = torch.finfo(y.dtype)
        bound = kind.eps / 2 * truth.abs() + PRODUCT_ROUNDINGS * ROUNDING * size + kind.tiny * kind.eps
        self._bound(what, (y.double() - truth).abs(), bound)

    def equal(self, what: str, y: Tensor, other: Tensor) -> None:
        """Bit for bit."""
        if self.silent:
            return
        if y.shape != other.shape or not torch.equal(y, other):
            count = int((y != other).sum()) if y.shape == other.shape else -1
            raise Wrong(f"{what}: {count} of {y.numel()} entries differ")

    def _bound(self, what: str, off: Tensor, bound: Tensor) -> None:
        if off.numel() == 0:
            return
        share = off / bound
        worst = float(share.max())
        if not worst <= 1:  # a NaN is wrong as well
            count = int((~(share <= 1)).sum())
            at = int(share.nan_to_num(nan=float("inf")).argmax())
            raise Wrong(
                f"{what}: {count} of {off.numel()} entries are off, the worst by {float(off.flatten()[at]):.4g} where "
                f"{float(bound.flatten()[at]):.4g} is allowed"
            )
        key = what.split(",")[0].split(" ")[0]
        self.worst[key] = round(max(self.worst.get(key, 0.0), worst), 4)


class Silent(Judge):
    """Judges nothing: of launches that are kept instead of run."""

    silent = True


def product_sums(q: Tensor, columns: Tensor, geometry: Geometry, size: tuple[int, int, int] | None = None) -> Tensor:
    """q times weight, exact: q int8 [M, C'] or, with size (images, rows and columns of the output), an image
    [B, H', W', C']; columns int8 [N, kh * kw * C'] -> float64 [M, N]."""
    if size is None:
        return q.double() @ columns.double().t()
    n, (kh, kw), c = columns.shape[0], geometry.shape[2:], q.shape[-1]
    taps = columns.view(n, kh, kw, c).double()
    acc: Any = 0.0
    for i in range(kh):
        for j in range(kw):
            top, left = i * geometry.dilation[0], j * geometry.dilation[1]
            rows = slice(top, top + geometry.stride[0] * (size[1] - 1) + 1, geometry.stride[0])
            across = slice(left, left + geometry.stride[1] * (size[2] - 1) + 1, geometry.stride[1])
            acc = acc + q[:, rows, across].reshape(-1, c).double() @ taps[:, i, j].t()
    return acc
