"""The entries of `bench.quality`: how each model is made of the float one."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import ModuleType
from typing import Any

OURS = "ours"


@dataclass
class Source:
    """One float model, and what the entries that are made of it share.

    model: the MODEL in float16, as people have it. find: makes the calibration. seconds: what the calibration took.
    notes: entry -> what a reader of its figures must know.
    """

    pack: ModuleType
    model: Any
    find: Callable[[Any], tuple[Any, float]]
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def module(self, name: str) -> ModuleType:
        """A module of the pack, such as "host.quantize"."""
        return sys.modules[f"{self.pack.__name__}.tfmq.{name}"]

    @cached_property
    def calibrated(self) -> tuple[Any, float]:
        """The calibration, and the seconds that it took."""
        return self.find(self.model)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Path -> "linear" or "conv2d" of the layers that W8A8 quantizes."""
        return self.kinds_of(preset("W8A8")(self))

    def kinds_of(self, model: Any) -> dict[str, str]:
        return self.module("host.quantized").require_quantized(model).kinds

    @property
    def linears(self) -> list[str]:
        return [path for path, kind in self.kinds.items() if kind == "linear"]


Maker = Callable[[Source], Any]


def make(name: str, source: Source) -> tuple[Any, float]:
    """The MODEL of an entry, and the seconds from the float model to it, calibration included."""
    before = source.calibrated[1] if name.startswith(OURS) else 0.0
    if name == MIXED or name.startswith("host"):
        _ = source.kinds  # which layers these are is no part of their time
    started = time.perf_counter()
    model = MAKERS[name](source)
    seconds = before + time.perf_counter() - started
    if name == "ours_w8a8":
        source.kinds = source.kinds_of(model)
    return model, seconds


def ours(recipe: Any) -> Maker:
    """By the code behind TFMQ Quantize."""

    def quantize(source: Source) -> Any:
        return source.module("host.quantize").quantize(source.model, source.calibrated[0], recipe, lambda *_: None)

    return quantize


def preset(name: str, **changed: Any) -> Maker:
    return lambda source: ours(replace(source.module("scheme").PRESETS[name], **changed))(source)


def _float16(source: Source) -> Any:
    source.notes["float16"] = {"computes_in": str(source.model.model.get_dtype_inference()).removeprefix("torch.")}
    return source.model


def _int8(rotated: bool) -> Maker:
    def quantize(source: Source) -> Any:
        from bench.quality.host_formats import int8_model

        return int8_model(source.model, source.linears, rotated)

    return quantize


def _w4a4(source: Source) -> Any:
    from bench.quality.host_formats import w4a4_model

    model, left = w4a4_model(source.model, source.linears)
    source.notes["host_convrot_w4a4"] = {"layers": len(source.linears) - len(left), "layers_left_in_float16": len(left)}
    return model


def _nf4(source: Source) -> Any:
    from bench.quality.host_formats import nf4_model

    model = nf4_model(source.model)
    source.notes["bitsandbytes_nf4"] = {"layers": len(model.object_patches)}
    return model


def in_bytes(source: Source, size: int, rounding: str) -> Any:
    """The MODEL of a mixed plan of at most `size` bytes, or None if there is none so small."""
    try:
        return preset("best under a size", budget=size, rounding=rounding)(source)
    except source.module("errors").TfmqError:
        return None


def _mixed(bits: int) -> Maker:
    """So many bits for a weight of the layers that W8A8 quantizes, scales included, on the average."""

    def quantize(source: Source) -> Any:
        network = source.model.model.diffusion_model
        total = sum(parameter.numel() for parameter in network.parameters())
        weights = sum(network.get_submodule(path).weight.numel() for path in source.kinds)
        budget = 2 * (total - weights) + weights * bits // 8
        return preset("best under a size", budget=budget, rounding="balanced")(source)

    return quantize


def dominated(
    entries: Mapping[str, Mapping[str, Any]], measure: Callable[[str, int], Mapping[str, Any] | None]
) -> dict[str, dict[str, Any]]:
    """For each entry, the best PSNR of a mixed plan of at most its bytes that is known, and whether it is as good.

    measure: entry and bytes -> `bytes` and `psnr_db` of the mixed plan of at most these, or None if there is none so
    small. A plan that was good enough for a smaller entry is not made anew. psnr_db None: identical pictures.
    float16 is the plan that leaves every layer in float.
    """
    plans = [(own["bytes"], _exactness(own)) for name, own in entries.items() if name == MIXED]
    found: dict[str, dict[str, Any]] = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["bytes"]):
        if name in (MIXED, "float16"):
            continue
        size, wanted = entry["bytes"], _exactness(entry)
        if not any(plan <= size and exact >= wanted for plan, exact in plans):
            mixed = measure(name, size)
            plans += [] if mixed is None else [(mixed["bytes"], _exactness(mixed))]
        exact, plan = max(((exact, plan) for plan, exact in plans if plan <= size), default=(None, None))
        found[name] = {
            "bytes": size,
            "mixed_bytes": plan,
            "mixed_psnr_db": None if exact is None or math.isinf(exact) else exact,
            "dominated": exact is not None and exact >= wanted,
        }
    return found


def _exactness(entry: Mapping[str, Any]) -> float:
    return math.inf if entry["psnr_db"] is None else entry["psnr_db"]


MIXED = "ours_mixed_5bit"
# The mixed plan against one of these is rounded as long as it.
EFFORTS = {"ours_w4a8_best": "best", "ours_w4a8_best_plus": "best+"}
ABLATED = "ours_w4a8_balanced"  # the model whose temporal path is quantized in each way
# In the order of the table. float32 is not made: it is what the others are compared with.
MAKERS: dict[str, Maker] = {
    "float16": _float16,
    "ours_w8a8": preset("W8A8"),
    "ours_w8a8_linear": preset("W8A8 Linear only"),
    "ours_w4a8_nearest": preset("W4A8", rounding="nearest"),
    "ours_w4a8_fast": preset("W4A8", rounding="fast"),
    ABLATED: preset("W4A8", rounding="balanced"),
    **{name: preset("W4A8", rounding=effort) for name, effort in EFFORTS.items()},
    "ours_w4a16": preset("W4A16 NF4"),
    MIXED: _mixed(5),
    "host_int8": _int8(False),
    "host_int8_convrot": _int8(True),
    "host_convrot_w4a4": _w4a4,
    "bitsandbytes_nf4": _nf4,
}
