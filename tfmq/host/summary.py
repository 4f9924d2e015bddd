"""What a node says about a quantized MODEL: for people as text, for programs as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

from ..kernels.table import BACKENDS
from ..scheme import Plan
from ..words import counted
from .quantized import Quantized

MEGABYTE = 1e6
NOTES = {backend.name: backend.note for backend in BACKENDS}


def text(quantized: Quantized) -> str:
    """Layers per scheme, bytes, backends, and what was left alone and why."""
    plan = quantized.plan
    schemes = Counter((kind(quantized, path), scheme.label) for path, scheme in plan.layers.items())
    lines = [
        f"{plan.recipe.name}: {len(plan.layers)} of {total(plan)} Linear and Conv2d layers are quantized",
        *(f"  {count} {what} {label}" for (what, label), count in sorted(schemes.items())),
        f"network: {quantized.bytes_before / MEGABYTE:.1f} MB -> {quantized.bytes_after / MEGABYTE:.1f} MB "
        f"({quantized.bytes_before / max(quantized.bytes_after, 1):.2f} x smaller)",
    ]
    for operation, counts in sorted(quantized.backends.items()):
        shares = ", ".join(f"{name} ({counted(count, 'layer')})" for name, count in counts.items())
        lines.append(f"{operation} runs on: {shares}")
        lines += [f"  {name}: {NOTES[name]}" for name in counts if NOTES.get(name)]
    used = {name for counts in quantized.backends.values() for name in counts}
    for name, why in sorted(quantized.passed_over.items()):
        lines.append(f"  {name} passed over{' by other layers' if name in used else ''}: {why}")
    lines += [line for line in (quantized.rounding, quantized.advice) if line]
    reasons = Counter(plan.left.values())
    lines += [f"left in float: {counted(count, 'layer')}, {why}" for why, count in sorted(reasons.items())]
    if plan.temporal:
        lines.append(f"temporal path: {plan.recipe.temporal}")
        lines += [f"  {path}: {why}" for path, why in plan.temporal.items()]
    return "\n".join(lines)


def report(quantized: Quantized) -> str:
    """JSON: `layers` {total, quantized_linear, quantized_conv}, `bytes` {before, after}, `schemes`, `left`, ..."""
    plan = quantized.plan
    kinds = Counter(kind(quantized, path) for path in plan.layers)
    return json.dumps(
        {
            "layers": {
                "total": total(plan),
                "quantized_linear": kinds["Linear"],
                "quantized_conv": kinds["Conv2d"],
            },
            "bytes": {"before": quantized.bytes_before, "after": quantized.bytes_after},
            "schemes": dict(Counter(scheme.label for scheme in plan.layers.values())),
            "left": dict(Counter(plan.left.values())),
            "backends": quantized.backends,
            "reasons": plan.reasons,
            "plan": {"recipe": asdict(plan.recipe), "layers": {path: asdict(s) for path, s in plan.layers.items()}},
            "temporal": {"mode": plan.recipe.temporal, "layers": plan.temporal},
        },
        indent=1,
    )


def total(plan: Plan) -> int:
    """Linear and Conv2d layers of the network."""
    return len(plan.layers) + len(plan.left) + len(plan.temporal)


def kind(quantized: Quantized, path: str) -> str:
    return "Conv2d" if quantized.kinds[path] == "conv2d" else "Linear"
