"""Observers: what a calibration run learns about the input of every layer, per interval, in constant memory.

A run has two stages. In the first every layer learns the range of each input channel; from these and from its weight
follows the balance vector, and from a sample of its input whether and how it could be rotated. In the second it learns
the distribution of the balanced input and the error that per-token quantization would make on it, without and with that
rotation.

Linear layers that read one tensor (q, k, v; w1 and w3 of a gated network) are observed as one: the same balance,
rotation and grid for all, so that at run time the tensor is quantized once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TfmqError
from ..formats.affine import quantize_rows
from ..formats.hadamard import choose_rotation, group_of, rotate
from ..geometry import Geometry, geometry_of
from ..runtime.branches import BRANCHES, WORTHWHILE, branch_of_rows, gain
from ..scheme import Scheme
from ..timeline import Clock
from .balance import choose_balance

BINS = 1024
MARGIN = 0.25  # by how much a histogram reaches beyond the range of the first stage
SAMPLE = 1 << 16  # entries of one input that enter the histogram; the ranges see all of them
KEPT = 64  # rows of the inputs that a rotation is chosen by and a weight is rounded by
OFFERED = 4  # rows of one input that may be among them


@dataclass(frozen=True)
class LayerStatistics:
    """What was learnt about one layer.

    kind: "linear" or "conv2d". shape: of the weight. order: place in the order of execution. All else is equal in
    Linear layers that read one tensor. low, high [I]: least and
    greatest balanced input. balance [K] or None. histogram [I, B] of the balanced input over equal bins of
    [bin_low, bin_high]. row_error [I, 2]: squared error of per-token quantization, and energy (zeros for conv2d).
    vector: every input had one row per image (no tokens, no pixels). branches [2, I, B]: the histogram of the
    conditional and of the unconditional rows, only where a grid for each lowers the error. rotated: the same about the
    rotated input (`rotation`), or None where the channels do not divide into blocks; permutations [1, K] or [2, K]:
    of that rotation, or None. weight_error [2, 2]: squared error of the weight, plain and rotated, in 8 and in 4 bits,
    on the scale on which the error of an input is relative (`rotation_choice`).
    mean_square [K]: of the balanced input's channels. rows [R, K']: a sample of what the weight is multiplied by before
    balance and rotation, bfloat16, in the order of `weight.flatten(1)`; None of a grouped convolution and of a vector.
    Intervals that no call visited have zero counts.
    """

    kind: str
    shape: tuple[int, ...]
    order: int
    low: Tensor
    high: Tensor
    balance: Tensor | None
    histogram: Tensor
    bin_low: Tensor
    bin_high: Tensor
    row_error: Tensor
    vector: bool = False
    branches: Tensor | None = None
    mean_square: Tensor | None = None
    rotated: LayerStatistics | None = None
    permutations: Tensor | None = None
    weight_error: Tensor | None = None
    rows: Tensor | None = None

    def under(self, scheme: Scheme) -> LayerStatistics:
        """The statistics of the input that is quantized: of the rotated one where the scheme says so."""
        return self.rotated if scheme.rotation and self.rotated is not None else self


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
        """Some of the rows of an input that has so many entries."""
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


@dataclass(eq=False)
class _Read:
    """The last tensor that a Linear read: who observed it, the paths that read it, and the sums over its rows [K],
    where a sibling may follow. An inference tensor has no version that would tell that it was written to."""

    input: weakref.ref[Tensor]
    observer: LayerObserver
    paths: set[str]
    sums: Tensor | None


def _together(weights: list[Tensor]) -> Tensor:
    """The weights [N, K] of siblings, one below the other, each at unit size: it is relative errors that count, and a
    layer of small weights is not worth less."""
    parts = [weight.detach().cpu().float() for weight in weights]
    return torch.cat([w / w.square().mean().sqrt().clamp_min(1e-20) for w in parts])


class ModelObserver:
    """Watches the inputs of the given layers of a model. A context manager: on exit not a hook is left behind.

    `layers`: (path, Linear or Conv2d). The clock says which interval a call belongs to.

    Linear layers become siblings, which share an observer, when one runs for the first time right after another and
    reads the same tensor, with the same in it. What a sibling reads alone later on is observed as well.
    """

    def __init__(self, layers: Iterable[tuple[str, nn.Module]], clock: Clock) -> None:
        self.layers = dict(layers)
        self.clock = clock
        self.observers = {path: LayerObserver(m, clock.partition.count) for path, m in self.layers.items()}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._order: dict[str, int] = {}
        self._siblings: set[str] = set()  # paths of layers that have any
        self._last: _Read | None = None
        self.interval = 0
        self.active = True  # whether the call that runs counts
        self.branches: tuple[int, ...] = (0,)

    def __enter__(self) -> ModelObserver:
        for path, module in self.layers.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(path)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None

    def start_call(self, t: Tensor, branches: tuple[int, ...] = (0,)) -> None:
        """Tell the timesteps [B] and the branches (`Clock.set`) of the model call that begins."""
        self._last = None
        self.branches = branches
        self.clock.set(t, branches)
        self.interval = int(self.clock.index(t.device))

    def end_first_stage(self, weights: dict[str, Tensor] | None = None) -> None:
        """Close the first stage; `weights`: the float weight of a layer where it differs from the module's own."""
        groups: dict[LayerObserver, list[Tensor]] = {}
        for path, observer in self.observers.items():
            weight = (weights or {}).get(path, self.layers[path].weight)
            assert isinstance(weight, Tensor)
            groups.setdefault(observer, []).append(weight)
        for observer, own in groups.items():
            observer.end_first_stage(own[0] if len(own) == 1 else _together(own))

    def statistics(self) -> dict[str, LayerStatistics]:
        """Statistics of every layer that ran, in the order of execution."""
        found = {observer: observer.statistics() for observer in set(self.observers.values())}
        ran = {path: found[self.observers[path]] for path in self._order}
        return {path: self._own(path, s) for path, s in ran.items() if s is not None}

    def _own(self, path: str, statistics: LayerStatistics) -> LayerStatistics:
        """`statistics` as those of one layer; nothing of them is another's, since a file holds no tensor twice."""
        weight = self.layers[path].weight
        assert isinstance(weight, Tensor)
        changed: dict[str, Any] = {"shape": tuple(weight.shape), "order": self._order[path]}
        if path in self._siblings:
            changed |= {name: value.clone() for name, value in vars(statistics).items() if isinstance(value, Tensor)}
        if statistics.rotated is not None:
            changed["rotated"] = self._own(path, statistics.rotated)
        return replace(statistics, **changed)

    def _reads(self, path: str, x: Tensor) -> LayerObserver | None:
        """Who is to observe what the layer reads; None: it was observed when a sibling read it."""
        observer, last, first = self.observers[path], self._last, path not in self._order
        self._order.setdefault(path, len(self._order))
        if observer.kind != "linear":
            self._last = None
            return observer
        sums = None
        if first or path in self._siblings:
            sums = x.detach().reshape(-1, x.shape[-1]).sum(0, dtype=torch.float32)
        if (
            last is not None
            and last.input() is x
            and path not in last.paths
            and last.sums is not None
            and sums is not None
            and torch.equal(last.sums, sums)
        ):
            # Later than the first stage each has a balance of its own.
            if first and observer.histogram is None and last.observer.histogram is None:
                observer = self.observers[path] = last.observer
                self._siblings |= {path, *last.paths}
            if observer is last.observer:
                last.paths.add(path)
                return None
        self._last = _Read(weakref.ref(x), observer, {path}, sums)
        return observer

    def _hook(self, path: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            observer = self._reads(path, args[0])
            if observer is None or not self.active:
                return
            try:
                observer.observe(args[0], self.interval, self.branches)
            except FloatingPointError:
                raise TfmqError(
                    f"Layer {path} received NaN or infinite values while the unquantized model was sampling, so "
                    "nothing can be calibrated: check that the model makes a clean picture with these settings first "
                    "(a bf16 or fp32 compute dtype often cures it)."
                ) from None

        return hook
