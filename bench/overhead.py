"""Microseconds of Python that a leaf spends per call: what is left where the tensors are tiny and the kernels nothing.

`python dev.py bench overhead --json F`. The functions of the backend, and those of the host that bring a weight, are
replaced by ones that return what is at hand. The leaves take turns; each figure is the median of batches of calls. With
`--label` the figures go to that entry of the file, so that two versions of the code can be compared.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.speed.__main__ import describe
from devkit import inprocess
from tfmq import atomic

CHANNELS, SIDE, TOKENS = 16, 3, 2
CASES = ("linear_static", "linear_dynamic", "conv", "normed_conv", "shared_linear")
SHARING = 3  # leaves on one input
BATCH = 10  # calls that are timed together: reading the clock takes a tenth of a microsecond
Call = Callable[[Tensor], Any]


class Leaves:
    """Makes leaves of one copy of the pack. prefix: of its modules' names. host: as the host has them."""

    def __init__(self, prefix: str, host: bool) -> None:
        self.prefix, self.host = prefix, host
        time = self.module("timeline")
        self.run = self.module("runtime.run_state").RunState(time.TimeAxis(0.0, 999.0), time.Partition.uniform(4))
        self.given: dict[nn.Module, tuple[Tensor, Tensor | None, None]] = {}

    def module(self, name: str) -> Any:
        return importlib.import_module(f"{self.prefix}tfmq.{name}")

    def leaf(self, layer: nn.Linear | nn.Conv2d, activation: str, seed: int = 0) -> Any:
        affine = self.module("formats.affine")
        weight, geometry = layer.weight.detach(), self.module("geometry").geometry_of(layer)
        scale = affine.channel_scale(weight)
        edge = torch.full((4,), 4.0)
        grid = affine.affine_grid(-edge, edge) if activation == "static" else (None, None)
        scheme = self.module("scheme").Scheme(activation=activation)
        state = self.module("state").LayerState(
            "conv2d" if geometry.is_conv else "linear", scheme, geometry.shape, affine.quantize_weight(weight, scale),
            scale, None, *grid,
        )  # fmt: skip
        assert layer.bias is not None
        bias = layer.bias.detach()
        if self.host:
            made = self.module("host.leaf.leaf").make_leaf(layer, state, geometry, self.run, bias, torch.float32)
            self.given[made] = made.weight, made.bias, None
            return made
        core = self.module("runtime.leaf")
        return (core.QuantConv2d if geometry.is_conv else core.QuantLinear)(state, geometry, self.run, bias)

    def call(self, case: str) -> Call:
        """x -> what one call of the case makes of it."""
        if "linear" in case:
            kind = "dynamic" if case == "linear_dynamic" else "static"
            count = SHARING if case == "shared_linear" else 1
            leaves = [self.leaf(nn.Linear(CHANNELS, CHANNELS), kind) for _ in range(count)]
            return leaves[0] if count == 1 else lambda x: [leaf(x) for leaf in leaves]
        leaf = self.leaf(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), "static")
        if case == "conv":
            return leaf  # type: ignore[no-any-return]
        if not self.host:
            run = self.module("runtime.norm_silu_conv").run
            chain = nn.Sequential(nn.GroupNorm(4, CHANNELS), nn.SiLU(), leaf).eval()
            return lambda x: run(chain, x)
        norms = self.module("host.faster.norms")
        chain = nn.Sequential(norms.HOST_NORM(4, CHANNELS), nn.SiLU(), leaf).eval()
        return norms._fused(chain)  # type: ignore[no-any-return]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No time in the backend and the host."""
        table = self.module("kernels.table")
        codes, y = object(), torch.zeros(1, TOKENS, CHANNELS)
        names = "linear_static", "linear_dynamic", "conv2d_static", "conv2d_static_normed", "multiply"
        functions = {name: lambda *_, **__: y for name in names}
        halves = {name: lambda *_: codes for name in ("prepare", "quantize_static", "quantize_dynamic")}
        backend = table.Backend("none", SimpleNamespace(**functions, **halves), lambda *_: None, table.FREE)
        with patch.object(self.module("runtime.leaf"), "pick", lambda *_: backend):
            if not self.host:
                yield
                return
            import comfy.ops

            cast: dict[str, Any] = {"cast_bias_weight": lambda leaf, **_: self.given[leaf]}
            with patch.multiple(comfy.ops, run_every_op=_nothing, uncast_bias_weight=_nothing, **cast):
                yield


def _nothing(*_: Any) -> None:
    pass


def measure(prefix: str, host: bool, calls: int, rounds: int) -> dict[str, float]:
    """Case -> microseconds per call of a leaf. calls: of a case in each round, a multiple of BATCH."""
    leaves = Leaves(prefix, host)
    cases = {case: leaves.call(case) for case in CASES}
    # Two tensors in turn: to a leaf, the same one twice is another call.
    rows = [torch.randn(1, TOKENS, CHANNELS) for _ in range(2)]
    images = [torch.randn(1, CHANNELS, SIDE, SIDE) for _ in range(2)]
    times: dict[str, list[float]] = {case: [] for case in CASES}
    gc.collect()
    gc.disable()
    try:
        with leaves.alone(), torch.inference_mode():
            for number in range(rounds + 1):
                for case, call in cases.items():
                    inputs = (images if "conv" in case else rows) * (BATCH // 2)
                    for _ in range(calls // BATCH):
                        start = time.perf_counter()
                        for x in inputs:
                            call(x)
                        if number:  # in the first round weights are prepared and siblings learn of each other
                            times[case].append((time.perf_counter() - start) / BATCH)
    finally:
        gc.enable()
    each = {case: SHARING if case == "shared_linear" else 1 for case in CASES}
    return {case: round(1e6 * statistics.median(t) / each[case], 3) for case, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="not used")
    parser.add_argument("--prompts", help="not used")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="not used: the tensors are on the CPU")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--label", default="now", help="the entry of the file that they become (default: now)")
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {"core": measure("", False, arguments.calls, arguments.rounds)}
    try:
        prefix = f"{inprocess.load_pack().__name__}."
    except (FileNotFoundError, ImportError) as error:
        print(f"the host's leaves are left out: {error}")
    else:
        found["host"] = measure(prefix, True, arguments.calls, arguments.rounds)
    for kind, figures in found.items():
        for case, microseconds in figures.items():
            print(f"{kind:6s}{case:16s}{microseconds:8.2f} us")
    if arguments.json:
        path = arguments.json
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        before |= {"machine": describe(torch.device("cpu")), arguments.label: found}
        atomic.write_bytes(path, f"{json.dumps(before, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
