"""The stages of bench/gpu_check.py, in their order, and how they share the time. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

TOTAL = 330.0  # seconds that the numbers below add up to, with OPTIONAL for all optional stages together
OPTIONAL = 65.0
LEAST = 5.0  # no stage begins with less: it would end while torch is being imported
ENOUGH = 15.0  # what torch takes to be imported from a slow disk, and a little work


@dataclass(frozen=True)
class Stage:
    """seconds: of TOTAL. on_cpu: whether it can do something without a GPU. optional: only in time that is left."""

    name: str
    seconds: float
    about: str
    on_cpu: bool = False
    optional: bool = False


STAGES = (
    Stage("env", 10, "versions, compiler, copy rate, what the vendor's products reach", on_cpu=True),
    Stage("compile", 45, "every variant of the kernels, in parallel", on_cpu=True),
    Stage("parity", 50, "every kernel against float64", on_cpu=True),
    Stage("ops", 60, "single layers, and each tile"),
    Stage("host", 10, "Python's time and launches of a layer"),
    Stage("sd15", 40, "the network of SD1.5"),
    Stage("sdxl", 50, "the network of SDXL"),
    Stage("compiled", 60, "under torch.compile", optional=True),
    Stage("comfy", 60, "the demo in ComfyUI, against the CPU's pictures", optional=True),
)
NAMES = tuple(stage.name for stage in STAGES)


def share(own: Stage, behind: list[Stage], left: float) -> float:
    """Seconds for a stage when `left` seconds are left for it and those behind it: in proportion, so that what a stage
    did not use goes to the later ones, but ENOUGH where they are there."""
    together = [own, *behind]
    needed = sum(stage.seconds for stage in together if not stage.optional)
    extra = sum(stage.seconds for stage in together if stage.optional)
    whole = needed + (extra if own.optional else min(OPTIONAL, extra))
    return max(left * own.seconds / whole, min(left, ENOUGH))
