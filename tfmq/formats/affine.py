"""Affine quantization as pure functions: ranges, rounding, integers and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..words import Choice

INT8_MAX = 127
UINT8_MAX = 255
RANGE_NORM = 2.4  # exponent of the error that a range search minimises; Q-Diffusion (2302.04304), implementation


def channel_scale(weight: Tensor, bits: int = 8) -> Tensor:
    """Symmetric scale per output channel from the largest magnitude. weight [N, ...] float -> float32 [N], > 0."""
    top = 2 ** (bits - 1) - 1
    amax = weight.detach().float().flatten(1).abs().amax(dim=1)
    return (amax / top).clamp_min(torch.finfo(torch.float32).tiny * 256)


def quantize_weight(weight: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """weight [N, ...] float, scale float32 [N] -> int8 codes [N, ...] in the symmetric range, nearest."""
    top = 2 ** (bits - 1) - 1
    codes = weight.detach().float() / per_channel(scale, weight.dim())
    return codes.round_().clamp_(-top, top).to(torch.int8)


def dequantize_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """int8 codes [N, ...], scale float32 [N] -> float weight [N, ...]."""
    return (codes.float() * per_channel(scale, codes.dim())).to(dtype)


def per_channel(vector: Tensor, dims: int, dim: int = 0) -> Tensor:
    """View a vector so that it broadcasts along `dim` of a tensor with `dims` dimensions."""
    shape = [1] * dims
    shape[dim] = -1
    return vector.reshape(shape)


def affine_grid(low: Tensor, high: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) of the unsigned grid 0 .. 2^bits - 1 over [low, high], elementwise.

    The range is widened to contain 0, so that zero padding and the many exact zeros have no error.
    """
    top = 2**bits - 1
    low = low.float().clamp_max(0.0)
    high = high.float().clamp_min(0.0)
    scale = ((high - low) / top).clamp_min(torch.finfo(torch.float32).tiny * 256)
    zero_point = (-low / scale).round_().clamp_(0, top).to(torch.int32)
    return scale, zero_point


def quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor, inverse_balance: Tensor | None = None) -> Tensor:
    """x float (channels last in `inverse_balance`'s broadcast shape) -> uint8 codes, same shape and memory format.

    codes = clamp(round(x * inverse_balance / scale) + zero_point, 0, 255); scale and zero_point are tensors of one
    element on x's device, so nothing is read back to the host.
    """
    factor = scale.reciprocal() if inverse_balance is None else inverse_balance / scale
    q = x.float() * factor
    return q.round_().add_(zero_point).clamp_(0, UINT8_MAX).to(torch.uint8)


def quantize_rows(x: Tensor, inverse_balance: Tensor | None = None, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token affine quantization. x [M, K] -> int8 codes [M, K], scale [M, 1], offset [M, 1] (float32).

    x * inverse_balance = offset + scale * codes, codes in -2^(bits - 1) .. 2^(bits - 1) - 1, so that the smallest and
    the largest entry of every row are grid points.
    """
    half = 2 ** (bits - 1)
    x = x.float() if inverse_balance is None else x.float() * inverse_balance
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)  # faster than `aminmax`
    scale = ((high - low) / (2 * half - 1)).clamp_min(torch.finfo(torch.float32).tiny * 256)
    codes = ((x - low) / scale).round_().sub_(half).clamp_(-half, half - 1).to(torch.int8)
    return codes, scale, low + half * scale


def search_range(
    histogram: Tensor, low: Tensor, high: Tensor, method: str = "mse", bits: int = 8
) -> tuple[Tensor, Tensor]:
    """Clipping range of a static grid from histograms.

    histogram [I, B] counts over equal bins of [low, high] ([I] each). method: one of `SEARCHES`. Returns low, high [I],
    float32, low <= 0 <= high. A row without any count returns zeros. Raises ValueError for another method.
    """
    if method not in SEARCHES:
        raise ValueError(f"unknown range method {method!r}")
    counts = histogram.double()
    bins = counts.shape[1]
    low, high = low.double(), high.double()
    width = (high - low) / bins
    filled = counts > 0
    ends = torch.stack([_outer_bins(row) for row in filled])
    lo = (low + ends[:, 0] * width).clamp_max(0.0)
    hi = (low + (ends[:, 1] + 1) * width).clamp_min(0.0)
    lo, hi = SEARCHES[method].value(counts, low, high, lo, hi, bits)
    empty = counts.sum(1) == 0
    return lo.masked_fill(empty, 0.0).float(), hi.masked_fill(empty, 0.0).float()


def histogram_error(
    histogram: Tensor, low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8
) -> Tensor:
    """Squared error and energy of a static grid on a histogram: counts [I, B], the rest [I] -> float64 [I, 2]."""
    counts, centers = histogram.double(), bin_centers(histogram, low, high)
    scale = scale.double()
    bottom = -zero_point.double() * scale
    error = (counts * _grid_error(centers, bottom, bottom + (2**bits - 1) * scale, scale, 2.0)).sum(1)
    return torch.stack([error, (counts * centers.square()).sum(1)], dim=1)


def bin_centers(histogram: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Centres of the equal bins of [low, high], float64 [I, B], for a histogram [I, B]."""
    bins = histogram.shape[1]
    position = (torch.arange(bins, dtype=torch.float64, device=histogram.device) + 0.5) / bins
    return low.double().unsqueeze(1) + position * (high - low).double().unsqueeze(1)


def _outer_bins(filled: Tensor) -> Tensor:
    where = filled.nonzero().flatten()
    if where.numel() == 0:
        return torch.tensor([0.0, filled.numel() - 1.0], dtype=torch.float64)
    return torch.stack([where[0], where[-1]]).double()


def _grid_error(x: Tensor, bottom: Tensor, top: Tensor, scale: Tensor, norm: float) -> Tensor:
    """Expected |x - q(x)|^norm: uniform rounding error inside [bottom, top], distance to the end plus that outside."""
    beyond = (bottom.unsqueeze(1) - x).clamp_min(0) + (x - top.unsqueeze(1)).clamp_min(0)
    rounding = ((scale / 2).pow(norm) / (norm + 1)).unsqueeze(1)
    return torch.where(beyond > 0, beyond.pow(norm) + rounding, rounding)


# The searches: counts [I, B] over equal bins of [low, high], outermost filled bins lo, hi [I] -> the range, [I] each.
def _outermost(counts: Tensor, low: Tensor, high: Tensor, lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return lo, hi


def _percentile(counts: Tensor, low: Tensor, high: Tensor, lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    width = (high - low) / counts.shape[1]
    mass = counts.cumsum(1) / counts.sum(1).clamp_min(1).unsqueeze(1)
    tail = 5e-5
    first, last = (mass <= tail).sum(1), (mass < 1 - tail).sum(1)
    return (low + first * width).clamp(max=0.0), (low + (last + 1) * width).clamp(min=0.0)


def _least_error(counts: Tensor, low: Tensor, high: Tensor, lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    centers = bin_centers(counts, low, high)
    # Coordinate search: shrink both ends together, then each end alone, out to the data again if that is better. One
    # end is often a hard edge (a SiLU never goes under -0.2785) that must not be cut when the other end's tail is.
    factors = torch.linspace(1.0, 0.3, 36, dtype=torch.float64, device=counts.device)
    lows, highs = lo * factors.unsqueeze(1), hi * factors.unsqueeze(1)
    # What an end cuts off does not depend on the other end: each once, in float32, as powers are what takes the time.
    cut_low = _cut(counts, centers, lows)
    cut_high = _cut(counts, -centers, -highs)
    total = counts.sum(1)

    def best(at_low: Tensor, at_high: Tensor) -> tuple[Tensor, Tensor]:
        """at_low, at_high [S, I]: candidates, numbers of factors -> those with the least error, [I]."""
        step = (highs.gather(0, at_high) - lows.gather(0, at_low)) / (2**bits - 1)
        rounding = (step / 2).pow(RANGE_NORM) / (RANGE_NORM + 1) * total
        least = (cut_low.gather(0, at_low) + cut_high.gather(0, at_high) + rounding).argmin(0, keepdim=True)
        return at_low.gather(0, least), at_high.gather(0, least)

    every = torch.arange(len(factors), device=counts.device).unsqueeze(1).expand_as(lows)
    at_low, at_high = best(every, every)
    at_low, at_high = best(at_low.expand_as(every), every)
    at_low, at_high = best(every, at_high.expand_as(every))
    return lows.gather(0, at_low)[0], highs.gather(0, at_high)[0]


def _cut(counts: Tensor, centers: Tensor, ends: Tensor) -> Tensor:
    """Sum over the bins below each end of counts * distance^RANGE_NORM. counts, centers [I, B], ends [S, I] -> [S, I].

    The reach of an interval is taken for its unit, so that float32 holds the powers of any input.
    """
    unit = centers.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    counts, places = counts.float(), (centers / unit).float()
    at = (ends / unit.squeeze(1)).float()
    cut = torch.stack([(counts * (e.unsqueeze(1) - places).clamp_min(0).pow(RANGE_NORM)).sum(1) for e in at])
    return cut.double() * unit.squeeze(1).pow(RANGE_NORM)


MSE = "mse"
SEARCHES = {
    MSE: Choice("a range per interval, with the least error", _least_error),  # sum |x - q(x)|^2.4
    "percentile": Choice("a range per interval, 99.99 % of the values", _percentile),
    "minmax": Choice("a range per interval, all values", _outermost),
}
