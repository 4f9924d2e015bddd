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
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TfmqError
from ..timeline import Clock
from .layer import LayerObserver
from .statistics import LayerStatistics


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
