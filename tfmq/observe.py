"""Observers: what a calibration run learns about the input of every layer, per interval, in constant memory.

A run has two stages. In the first every layer learns the range of each input channel; from these and from its weight
follows the balance vector. In the second it learns the distribution of the balanced input and the error that
per-token quantization would make on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from .balance import choose_balance
from .errors import TfmqError
from .guidance import BRANCHES, WORTHWHILE, gain, split
from .quantizer import quantize_rows
from .rotation import group_of, rotate
from .timeline import Clock

BINS = 1024
MARGIN = 0.25  # by how much a histogram reaches beyond the range of the first stage
SAMPLE = 1 << 16  # entries of one input that enter the histogram; the ranges see all of them


@dataclass(frozen=True)
class LayerStatistics:
    """What was learnt about one layer.

    kind: "linear" or "conv2d". shape: of the weight. order: place in the order of execution. low, high [I]: least and
    greatest balanced input. balance [K] or None. histogram [I, B] of the balanced input over equal bins of
    [bin_low, bin_high]. row_error [I, 2]: squared error of per-token quantization, and energy (zeros for conv2d).
    vector: every input had one row per image (no tokens, no pixels). branches [2, I, B]: the histogram of the
    conditional and of the unconditional rows, only where a grid for each lowers the error. rotated_error: as row_error
    after a Hadamard rotation (`rotation`), or None where the channels do not divide into blocks.
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
    rotated_error: Tensor | None = None


class LayerObserver:
    """Statistics of one Linear or Conv2d; constant memory of I * (2 K + B) numbers."""

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
        self.order = -1
        self.vector = True
        self.balance: Tensor | None = None
        self.histogram: Tensor | None = None
        self.bin_low = torch.zeros(intervals)
        self.bin_high = torch.zeros(intervals)
        self.row_error = torch.zeros(intervals, 2, dtype=torch.float64)
        self.rotation = group_of(channels) if self.kind == "linear" else 0
        self.rotated_error = torch.zeros(intervals, 2, dtype=torch.float64)

    def observe(self, x: Tensor, interval: int, branches: tuple[int, ...] = (0,)) -> None:
        """x: the layer's input, [..., K] or [B, K, H, W]; branches: as in `Clock.set`."""
        if x.numel() == 0:
            return
        self.calls += 1
        for branch, piece in split(x.detach(), branches):
            self._observe(piece, interval, branch)

    def _observe(self, x: Tensor, interval: int, branch: int) -> None:
        rows = x.movedim(1, -1) if self.kind == "conv2d" else x
        rows = rows.reshape(-1, rows.shape[-1])
        self.vector &= x.dim() == 2
        low, high = torch.aminmax(rows, dim=0)
        low, high = low.float().cpu(), high.float().cpu()
        if not (bool(torch.isfinite(low).all()) and bool(torch.isfinite(high).all())):
            raise FloatingPointError
        self.low[interval] = torch.minimum(self.low[interval], low)
        self.high[interval] = torch.maximum(self.high[interval], high)
        rows = self._sample(rows)
        if self.histogram is None:
            self.square += rows.square().sum(0).double().cpu()
            self.rows += rows.shape[0]
            return
        if self.balance is not None:
            rows = rows / self.balance.to(rows.device)
        self._count(rows, interval, branch)
        if self.kind == "linear":
            self.row_error[interval] += _row_error(rows)
            if self.rotation:
                self.rotated_error[interval] += _row_error(rotate(rows, self.rotation))

    def _sample(self, rows: Tensor) -> Tensor:
        step = -(-rows.numel() // SAMPLE)
        # A start that moves from call to call, so that no fixed set of pixels is all that is ever seen.
        return rows[self.calls * 7919 % step :: step].float() if step > 1 else rows.float()

    def _count(self, rows: Tensor, interval: int, branch: int) -> None:
        assert self.histogram is not None
        low, high = float(self.bin_low[interval]), float(self.bin_high[interval])
        place = ((rows - low) * (BINS / (high - low))).clamp_(0, BINS - 1).to(torch.int32)
        self.histogram[branch, interval] += torch.bincount(place.flatten(), minlength=BINS).cpu()

    def end_first_stage(self, weight: Tensor) -> None:
        """Choose the balance and lay out the histograms. weight: the layer's float weight, on any device."""
        if self.calls == 0:
            return
        mean_square = self.square / max(self.rows, 1)
        self.balance = choose_balance(self.low, self.high, mean_square, weight.cpu()) if weight.dim() > 1 else None
        low, high = self._balanced_range()
        seen = torch.isfinite(low)
        # Intervals that this stage did not visit get the widest range of those that it did.
        low = torch.where(seen, low, low[seen].min()).clamp_max(0)
        high = torch.where(seen, high, high[seen].max()).clamp_min(0)
        slack = (high - low).clamp_min(1e-6) * MARGIN
        self.bin_low, self.bin_high = low - slack, high + slack
        self.histogram = torch.zeros(BRANCHES, self.low.shape[0], BINS, dtype=torch.int64)

    def _balanced_range(self) -> tuple[Tensor, Tensor]:
        balance = self.balance if self.balance is not None else torch.ones(self.low.shape[1])
        return (self.low / balance).amin(1), (self.high / balance).amax(1)

    def statistics(self) -> LayerStatistics | None:
        """What was learnt, or None if the layer never ran."""
        if self.histogram is None or int(self.histogram.sum()) == 0:
            return None
        low, high = self._balanced_range()
        rotated = self.rotated_error if self.rotation else None
        apart = gain(self.histogram, self.bin_low, self.bin_high) <= WORTHWHILE
        branches = self.histogram if apart else None
        return LayerStatistics(
            self.kind, self.shape, self.order, low, high, self.balance,
            self.histogram.sum(0), self.bin_low, self.bin_high, self.row_error, self.vector, branches, rotated,
        )  # fmt: skip


def _row_error(rows: Tensor) -> Tensor:
    """Squared error of per-token quantization of rows [M, K], and their energy: float64 [2]."""
    codes, scale, offset = quantize_rows(rows)
    error = (codes * scale + offset - rows).square().sum()
    return torch.stack([error, rows.square().sum()]).double().cpu()


class ModelObserver:
    """Watches the inputs of the given layers of a model. A context manager: on exit not a hook is left behind.

    `layers`: (path, Linear or Conv2d). The clock says which interval a call belongs to.
    """

    def __init__(self, layers: Iterable[tuple[str, nn.Module]], clock: Clock) -> None:
        self.layers = dict(layers)
        self.clock = clock
        self.observers = {path: LayerObserver(m, clock.partition.count) for path, m in self.layers.items()}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._ran = 0
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

    def start_call(self, t: Tensor, branches: tuple[int, ...] = (0,)) -> None:
        """Tell the timesteps [B] and the branches (`Clock.set`) of the model call that begins."""
        self.branches = branches
        self.clock.set(t, branches)
        self.interval = int(self.clock.index(t.device))

    def end_first_stage(self, weights: dict[str, Tensor] | None = None) -> None:
        """Close the first stage; `weights`: the float weight of a layer where it differs from the module's own."""
        for path, observer in self.observers.items():
            weight = (weights or {}).get(path, self.layers[path].weight)
            assert isinstance(weight, Tensor)
            observer.end_first_stage(weight)

    def statistics(self) -> dict[str, LayerStatistics]:
        """Statistics of every layer that ran, in the order of execution."""
        found = {path: s for path, o in self.observers.items() if (s := o.statistics()) is not None}
        return dict(sorted(found.items(), key=lambda item: item[1].order))

    def _hook(self, path: str):
        observer = self.observers[path]

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if observer.order < 0:
                observer.order = self._ran
                self._ran += 1
            if not self.active:
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
