"""Find the Temporal Information Block without a table: change one input at a time and see which outputs move.

A layer belongs to the TIB if its output stays bit-identical whatever the latents and text tokens are, and moves with t
or with a pooled vector. Only what has been seen is reported: a layer that did not run, that gives NaN, or that answers
differently to the same inputs never qualifies.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from tfmq.temporal.tib import Tib, is_layer

NOTHING = "no TIB found"
PROBED = "found by probe"
_IMAGE, _TEXT, _T = "image", "text", "t"


@dataclass(frozen=True)
class Probe:
    """What a probe saw.

    tib: the TIB; architecture is "found by probe", or "no TIB found" with nothing in it. Its parameters are those of
        the layers: a parameter that is no layer's cannot be seen from outside.
    moved_by: path of each layer that can be judged -> the inputs that moved its output, out of "image", "text", "t" and
        the names of the vectors.
    pooled_text: layers moved by text, not by the latents or t, whose output has one row per sample: left out of the TIB
        (they know nothing of t), but they may feed it.
    not_seen: layers that did not run.
    unusable: path -> why its output says nothing ("not finite", "differs between equal runs", "no plain tensor").
    first, last: the layer that the latents reach first, and the last one to run whose output they move.
    """

    tib: Tib
    moved_by: dict[str, frozenset[str]]
    pooled_text: tuple[str, ...]
    not_seen: tuple[str, ...]
    unusable: dict[str, str]
    first: str | None
    last: str | None


@dataclass(frozen=True)
class _Print:
    """Fingerprint of all outputs of one layer in one run: one int64 per row of the last axis."""

    rows: torch.Tensor
    finite: bool
    calls: int


def find_by_probe(
    diffusion_model: torch.nn.Module,
    run: Callable[..., object],
    x: torch.Tensor,
    t: torch.Tensor,
    context: torch.Tensor,
    *,
    vector: Mapping[str, torch.Tensor] | None = None,
    text: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
) -> Probe:
    """Run the model five times and once more per vector, each time with one kind of input replaced.

    run: calls the model as `run(x, t, context, **vector, **text)`; whatever else the model needs is its own matter. Its
        result is ignored. It may change the tensors that it gets.
    x: latents, (batch, channels, ...). t: (batch,), or (batch, tokens) where the model takes one t per token.
    context: text tokens, (batch, tokens, width).
    vector: inputs with one row per sample, by keyword: pooled text, guidance, size. text: further token inputs.
    Floating inputs are replaced by noise minus themselves, integer ones are rolled along their last axis or, where that
    changes nothing, increased by one; t is replaced by 0.6 t (0.5 where it is 0), an integer t by its half (1).

    The verdict holds for these weights: a layer behind a branch whose weights are zero is not reached by that branch.
    Raises ValueError for a batch size that differs between inputs, or a name that another input has.
    """
    vector, text = dict(vector or {}), dict(text or {})
    _check(x, t, context, vector, text)
    noise = torch.Generator().manual_seed(seed)
    replace = partial(_replaced, generator=noise)
    given = {"x": x, "t": t, "context": context, **vector, **text}
    changes: dict[str, dict[str, torch.Tensor]] = {
        _IMAGE: {"x": replace(x)},
        _TEXT: {name: replace(given[name]) for name in ("context", *text)},
        _T: {"t": _other_t(t)},
        **{name: {name: replace(tensor)} for name, tensor in vector.items()},
    }
    layers = {path: module for path, module in diffusion_model.named_modules() if is_layer(module)}
    record = partial(_record, layers, run)

    base, calls, strange = record(given)
    again, _, _ = record(given)
    unusable = dict.fromkeys(strange, "no plain tensor")
    for path, seen in base.items():
        if not seen.finite:
            unusable[path] = "not finite"
        elif not _same(seen, again.get(path)):
            unusable[path] = "differs between equal runs"
    usable = [path for path in base if path not in unusable]

    moved: dict[str, set[str]] = {path: set() for path in usable}
    for name, change in changes.items():
        changed, _, _ = record({**given, **change})
        for path in usable:
            if not _same(base[path], changed.get(path)):
                moved[path].add(name)

    per_token: set[str] = set()
    if t.ndim > 1 and t[0].numel() > 1:
        one = t.clone()
        one[..., -1] = _other_t(t)[..., -1]
        changed, _, _ = record({**given, "t": one})
        per_token = {path for path in usable if _T in moved[path] and _partly(base[path], changed.get(path))}

    batch = x.shape[0]
    pooled = {path for path in usable if base[path].rows.numel() == batch * base[path].calls}
    found = {}
    for path in usable:
        dependency = _dependency(moved[path], path in pooled, path in per_token, set(vector))
        if dependency is not None:
            found[path] = dependency
    knows_t = any(dependency != "vector" for dependency in found.values())
    tib = Tib(PROBED, found, _parameters(layers, found)) if knows_t else Tib(NOTHING, {}, ())
    by_image = [path for path in calls if _IMAGE in moved.get(path, ())]
    return Probe(
        tib=tib,
        moved_by={path: frozenset(names) for path, names in moved.items()},
        pooled_text=tuple(
            path for path in usable if _TEXT in moved[path] and not moved[path] & {_IMAGE, _T} and path in pooled
        ),
        not_seen=tuple(path for path in layers if path not in base and path not in unusable),
        unusable=unusable,
        first=by_image[0] if by_image else None,
        last=by_image[-1] if by_image else None,
    )


def _dependency(moved: set[str], pooled: bool, per_token: bool, vectors: set[str]) -> str | None:
    """The word of the table (`architectures`) for what moved a layer; None if it is not temporal."""
    if _IMAGE in moved:
        return None
    if _TEXT in moved:
        return "t+text" if _T in moved and pooled else None
    if _T in moved:
        if per_token:
            return "per-token t"
        return "t+vector" if moved & vectors else "t"
    return "vector" if moved & vectors else None


def _record(
    layers: Mapping[str, torch.nn.Module], run: Callable[..., object], inputs: Mapping[str, torch.Tensor]
) -> tuple[dict[str, _Print], list[str], set[str]]:
    """Fingerprints by layer, the layer of every call in order, and the layers that gave no plain tensor."""
    seen: dict[str, _Print] = {}
    order: list[str] = []
    strange: set[str] = set()

    def hook(path: str, _module: torch.nn.Module, _args: object, output: object) -> None:
        order.append(path)
        if type(output) is not torch.Tensor or output.numel() == 0:
            strange.add(path)
            return
        rows, finite, calls = _fingerprint(output), bool(torch.isfinite(output).all()), 1
        before = seen.get(path)
        if before is not None:
            rows, finite, calls = torch.cat((before.rows, rows)), finite and before.finite, calls + before.calls
        seen[path] = _Print(rows, finite, calls)

    handles = [module.register_forward_hook(partial(hook, path)) for path, module in layers.items()]
    try:
        with torch.no_grad():
            fresh = {name: tensor.clone() for name, tensor in inputs.items()}
            run(fresh.pop("x"), fresh.pop("t"), fresh.pop("context"), **fresh)
    finally:
        for handle in handles:
            handle.remove()
    return {path: seen[path] for path in seen if path not in strange}, order, strange


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(output: torch.Tensor) -> torch.Tensor:
    """One int64 per row of the last axis, (rows,): a wrapping sum of bits times odd constants, the same on any device.

    Keeping outputs themselves would take gigabytes on a real model; integer arithmetic makes it independent of order.
    """
    rows = output.detach().reshape(-1, output.shape[-1]).contiguous()
    bits = rows.view(_INTEGERS[rows.element_size()]).to(torch.int64)
    factors = torch.arange(1, bits.shape[1] + 1, device=bits.device, dtype=torch.int64) * 0x9E3779B97F4A7C1 | 1
    mixed = (bits ^ (bits << 21)) * factors
    return (mixed ^ (mixed >> 29)).sum(1).cpu()


def _same(a: _Print, b: _Print | None) -> bool:
    return b is not None and torch.equal(a.rows, b.rows)


def _partly(a: _Print, b: _Print | None) -> bool:
    return b is not None and a.rows.shape == b.rows.shape and bool((a.rows == b.rows).any())


def _replaced(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.is_floating_point():  # minus the old one: a caller may have drawn that from the same seed
        return torch.randn(tensor.shape, generator=generator).to(tensor) - tensor
    rolled = tensor.roll(1, -1)
    return tensor + 1 if torch.equal(rolled, tensor) else rolled


def _other_t(t: torch.Tensor) -> torch.Tensor:
    if t.is_floating_point():
        return torch.where(t == 0, torch.full_like(t, 0.5), t * 0.6)
    return torch.where(t == 0, torch.ones_like(t), t // 2)


def _parameters(layers: Mapping[str, torch.nn.Module], found: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for path in found for name, _ in layers[path].named_parameters())


def _check(
    x: torch.Tensor,
    t: torch.Tensor,
    context: torch.Tensor,
    vector: Mapping[str, torch.Tensor],
    text: Mapping[str, torch.Tensor],
) -> None:
    taken = {"x", "t", "context", _IMAGE, _TEXT}
    both = set(vector) & (taken | set(text)) | set(text) & taken
    if both:
        raise ValueError(f"The probe uses the name {min(both)!r} for another input already: rename this one.")
    for name, tensor in {"t": t, "context": context, **vector, **text}.items():
        if tensor.ndim == 0 or tensor.shape[0] != x.shape[0]:
            raise ValueError(
                f"The probe's input {name!r} has shape {tuple(tensor.shape)}, the latents have {x.shape[0]} rows: "
                "give every input one row per sample."
            )
