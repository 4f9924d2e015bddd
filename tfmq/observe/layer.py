"""The observer of one layer's input, or of several Linear layers that read one tensor: its two stages."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch
from torch import Tensor, nn

from ..formats.affine import quantize_rows
from ..formats.hadamard import group_of, rotate
from ..geometry import Geometry, geometry_of
from ..runtime.branches import BRANCHES
from .balance import choose_balance
from .branches import WORTHWHILE, branch_of_rows, gain
from .rotation import choose_rotation
from .statistics import LayerStatistics

BINS = 1024


MARGIN = 0.25  # by how much a histogram reaches beyond the range of the first stage


SAMPLE = 1 << 16  # entries of one input that enter the histogram; the ranges see all of them


KEPT = 64  # rows of the inputs that a rotation is chosen by and a weight is rounded by


OFFERED = 4  # rows of one input that may be among them


class LayerObserver:
    """Statistics of one Linear or Conv2d, or of several Linear that read one tensor; constant memory of
    I * (2 K + 4 B) + KEPT * K' numbers."""

    def __init__(self, module: nn.Module, intervals: int) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        self.kind = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
        self.shape = tuple(weight.shape)
        channels = module.in_channels if isinstance(module, nn.Conv2d) else self.shape[1]
        assert isinstance(channels, int)
        # Stored on the CPU and in full precision: the model may leave the device between two prompts.
        self.low = torch.full((intervals, channels), float("inf"))
        self.high = torch.full((intervals, channels), float("-inf"))
        self.square = torch.zeros(channels, dtype=torch.float64)
        self.rows = 0
        self.calls = 0
        self.vector = True
        self.balance: Tensor | None = None
        self.histogram: Tensor | None = None
        self.bin_low = torch.zeros(intervals)
        self.bin_high = torch.zeros(intervals)
        self.row_error = torch.zeros(intervals, 2, dtype=torch.float64)
        self.group = group_of(channels) if self.kind == "linear" else 0
        geometry = geometry_of(module)
        self.geometry = geometry if isinstance(geometry, Geometry) and geometry.groups == 1 else None
        width = weight[0].numel()
        # A sample of directions, so half the bits will do.
        self.kept = torch.zeros(KEPT if self.geometry else 0, width, dtype=torch.bfloat16)
        self.offered = 0
        self.random = Random(0)
        self.rotated: _Rotated | None = None

    def observe(self, x: Tensor, interval: int, branches: tuple[int, ...] = (0,)) -> None:
        """x: the layer's input, [..., K] or [B, K, H, W]; branches: as in `Clock.set`."""
        if x.numel() == 0:
            return
        self.calls += 1
        x = x.detach()
        rows = x.movedim(1, -1) if self.kind == "conv2d" else x
        rows = rows.reshape(-1, rows.shape[-1])
        self.vector &= x.dim() == 2
        # Not by `aminmax`, which takes ten times as long over the first dimension.
        low, high = torch.stack([rows.amin(0), rows.amax(0)]).float().cpu()
        if not (bool(torch.isfinite(low).all()) and bool(torch.isfinite(high).all())):
            raise FloatingPointError
        self.low[interval] = torch.minimum(self.low[interval], low)
        self.high[interval] = torch.maximum(self.high[interval], high)
        of = branch_of_rows(x.shape[0], rows.shape[0], branches)
        entries = rows.numel()
        rows, of = self._sample(rows, entries).float(), self._sample(of, entries)
        if self.geometry is not None:
            self._keep(x, rows)
        if self.histogram is None:
            self.square += rows.square().sum(0).cpu().double()  # not every GPU has float64
            self.rows += rows.shape[0]
            return
        if self.balance is not None:
            rows = rows / self.balance.to(rows.device)
        self.histogram[:, interval] += _counts(rows, float(self.bin_low[interval]), float(self.bin_high[interval]), of)
        if self.kind == "linear":
            self.row_error[interval] += _row_error(rows)
            if self.rotated is not None:
                self.rotated.observe(rows, interval, of)

    def _sample(self, rows: Tensor, entries: int) -> Tensor:
        """Some of the rows of an input. entries: that it has."""
        step = -(-entries // SAMPLE)
        # A start that moves from call to call, so that no fixed set of pixels is all that is ever seen.
        return rows[self.calls * 7919 % step :: step]

    def _keep(self, x: Tensor, rows: Tensor) -> None:
        """Reservoir sampling over all calls (Vitter, 1985, algorithm R). rows: of the input x of a Linear."""
        for _ in range(OFFERED):
            self.offered += 1
            place = self.offered - 1 if self.offered <= KEPT else self.random.randrange(self.offered)
            if place < KEPT:
                row = rows[self.random.randrange(rows.shape[0])] if self.kind == "linear" else self._patch(x)
                self.kept[place] = row.flatten().bfloat16().cpu()

    def _patch(self, x: Tensor) -> Tensor:
        """What one output pixel of a convolution is made of, [C, kh, kw]; x [B, C, H, W]."""
        g = self.geometry
        assert g is not None
        places = []
        for extent, out, k, s, p, d in zip(
            x.shape[2:], g.output_size(*x.shape[2:]), g.shape[2:], g.stride, g.padding, g.dilation, strict=True
        ):
            place = torch.arange(k) * d + self.random.randrange(out) * s - p
            places.append((place.clamp(0, extent - 1), (place >= 0) & (place < extent)))
        (down, in_height), (across, in_width) = places
        image = x[self.random.randrange(x.shape[0])]
        inside = (in_height.unsqueeze(1) & in_width).to(x.device)
        return image[:, down.to(x.device).unsqueeze(1), across.to(x.device)] * inside

    def end_first_stage(self, weight: Tensor) -> None:
        """Choose the balance and lay out the histograms. weight: the layer's float weight, on any device; of several
        layers those of all, one below the other."""
        if self.calls == 0:
            return
        mean_square = self.square / max(self.rows, 1)
        weight = weight.detach().cpu()
        self.balance = choose_balance(self.low, self.high, mean_square, weight) if weight.dim() > 1 else None
        low, high = self._balanced_range()
        seen = torch.isfinite(low)
        # Intervals that this stage did not visit get the widest range of those that it did.
        low = torch.where(seen, low, low[seen].min()).clamp_max(0)
        high = torch.where(seen, high, high[seen].max()).clamp_min(0)
        slack = (high - low).clamp_min(1e-6) * MARGIN
        self.bin_low, self.bin_high = low - slack, high + slack
        self.histogram = torch.zeros(BRANCHES, self.low.shape[0], BINS, dtype=torch.int64)
        if self.offered and self.group:
            balance = self.balance if self.balance is not None else torch.ones(self.low.shape[1])
            reach = torch.maximum(-self.low, self.high).amax(0) / balance
            rows = self.kept[: self.offered].float() / balance
            chosen = choose_rotation(rows, reach, weight * balance, self.group)
            self.rotated = _Rotated(self.low.shape[0], self.group, *chosen)

    def _balanced_range(self) -> tuple[Tensor, Tensor]:
        balance = self.balance if self.balance is not None else torch.ones(self.low.shape[1])
        return (self.low / balance).amin(1), (self.high / balance).amax(1)

    def statistics(self) -> LayerStatistics | None:
        """What was learnt, or None if the layer never ran. shape and order are those of no layer in particular."""
        if self.histogram is None or int(self.histogram.sum()) == 0:
            return None
        low, high = self._balanced_range()
        mean_square = (self.square / max(self.rows, 1)).float()
        if self.balance is not None:
            mean_square = mean_square / self.balance.square()
        plain = LayerStatistics(
            self.kind, self.shape, -1, low, high, self.balance,
            self.histogram.sum(0), self.bin_low, self.bin_high, self.row_error, self.vector,
            _apart(self.histogram, self.bin_low, self.bin_high), mean_square,
            rows=self.kept[: self.offered] if self.offered and not self.vector else None,
        )  # fmt: skip
        return plain if self.rotated is None else self.rotated.statistics(plain)


class _Rotated:
    """The second stage's look at the rotated input.

    permutations, weight_error: see `rotation.choose_rotation`. Nothing is known of the range beforehand: the bins reach
    from -reach to reach, and where an entry lies beyond, two by two are merged.
    """

    def __init__(self, intervals: int, group: int, permutations: Tensor | None, weight_error: Tensor) -> None:
        self.group = group
        self.permutations = permutations
        self.weight_error = weight_error
        self.low = torch.full((intervals,), float("inf"))
        self.high = torch.full((intervals,), float("-inf"))
        self.reach = torch.zeros(intervals)
        self.histogram = torch.zeros(BRANCHES, intervals, BINS, dtype=torch.int64)
        self.row_error = torch.zeros(intervals, 2, dtype=torch.float64)

    def observe(self, rows: Tensor, interval: int, of: Tensor) -> None:
        """rows: the balanced input, float [M, K]; of: their branches, int64 [M]."""
        rows = rotate(rows, self.group, self.permutations)
        self.row_error[interval] += _row_error(rows)
        low, high = torch.stack(torch.aminmax(rows)).cpu()
        self.low[interval] = torch.minimum(self.low[interval], low)
        self.high[interval] = torch.maximum(self.high[interval], high)
        wanted, reach = max(float(-low), float(high), 1e-6), float(self.reach[interval])
        if reach == 0:
            reach = wanted * (1 + MARGIN)
        while reach < wanted:
            reach *= 2
            pairs = self.histogram[:, interval].view(BRANCHES, -1, 2).sum(2)
            self.histogram[:, interval] = 0
            self.histogram[:, interval, BINS // 4 : 3 * BINS // 4] = pairs
        self.reach[interval] = reach
        self.histogram[:, interval] += _counts(rows, -reach, reach, of)

    def statistics(self, plain: LayerStatistics) -> LayerStatistics:
        """`plain`, the statistics of the same layer's balanced input, with what was learnt here."""
        reach = self.reach.clamp_min(1e-6)
        rotated = replace(
            plain, low=self.low, high=self.high, histogram=self.histogram.sum(0), bin_low=-reach, bin_high=reach,
            row_error=self.row_error, branches=_apart(self.histogram, -reach, reach), mean_square=None,
        )  # fmt: skip
        return replace(plain, rotated=rotated, permutations=self.permutations, weight_error=self.weight_error)


def _counts(rows: Tensor, low: float, high: float, of: Tensor) -> Tensor:
    """Histogram of all entries over the bins of [low, high] per branch, int64 [2, B] on the CPU. of: int64 [M]."""
    place = ((rows - low) * (BINS / (high - low))).clamp_(0, BINS - 1).to(torch.int32)
    place += (of * BINS).to(rows.device, torch.int32).unsqueeze(1)
    return torch.bincount(place.flatten(), minlength=BRANCHES * BINS).view(BRANCHES, BINS).cpu()


def _apart(histogram: Tensor, low: Tensor, high: Tensor) -> Tensor | None:
    """The histograms per branch [2, I, B] where a grid for each lowers the error enough."""
    return histogram if gain(histogram, low, high) <= WORTHWHILE else None


def _row_error(rows: Tensor) -> Tensor:
    """Squared error of per-token quantization of rows [M, K], and their energy: float64 [2]."""
    codes, scale, offset = quantize_rows(rows)
    error = (codes * scale + offset - rows).square().sum()
    return torch.stack([error, rows.square().sum()]).cpu().double()
