"""Temporal information aware reconstruction (TIAR): round the weights of a Temporal Information Block (TIB) so that its
temporal features stay where they were, over all timesteps at once (TFMQ-DM, CVPR 2024, section 3.3).

The loss is sum_i || g_i(h(t)) - g_i_q(h_q(t)) ||^2 over the outputs i, mean over the timesteps t. Because t runs
through a finite set, no sample of it is needed and nothing is left to overfit to: what is measured is all there is.
Two stages:

1. Error feedback. Layer by layer, in the order of the graph, on the activations that the quantized layers before it
   really give: the weight is first moved to where it undoes their error, then rounded column by column, each column's
   rounding error being made up for by the columns that are still free (`tfmq.formats.gptq`, with the finite set as its
   calibration data). Closed form, seconds.
2. Joint AdaRound. All layers together by gradient: w = scale * (floor + h(alpha) - zero point), h(alpha) = clip(1.2
   sigmoid(alpha) - 0.1, 0, 1), loss + 0.01 sum(1 - |2 h - 1|^beta), beta from 20 to 2 after a warm-up of a fifth
   (AdaRound, 2004.10568, eq. 21 to 24; the weights of TFMQ-DM's implementation). TFMQ-DM takes 20 000 steps of 8 to 32
   timesteps at a learning rate of 1e-3. Here fewer steps of more timesteps at a higher rate start from the codes of
   stage 1, and the result counts only if its loss over all timesteps, with hard rounding, is the lower one. It is off
   by default: measured, it finds nothing that stage 1 left (docs/decisions/temporal-rounding.md).

Activations are quantized inside both stages, with finite-set calibration (`fsc`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.gptq import factors, places
from ..formats.rectified import alpha_of, rectified
from .features import TemporalGraph
from .fsc import (
    FiniteSet,
    QuantizedTib,
    calibrated,
    finite_set_grid,
    quantize_activation,
    weight_codes,
    weight_grid,
)

# Shares of the mean diagonal of X^T X that keep the free columns from running away. Less fits better until the moved
# weights outgrow the grid; so they are tried in this order, layer by layer, for as long as the measured error falls.
DAMPINGS = (1e-2, 1e-4, 1e-5)
STEPS, BATCH, RATE = 0, 128, 1e-2
REGULARIZER, WARM_UP, BETA = 0.01, 0.2, (20.0, 2.0)
START = 0.9  # h of an entry that stage 1 rounded up; 1 - START of one that it rounded down

Codes = tuple[Tensor, Tensor, Tensor]  # codes uint8 [N, K], scale float32 [N], zero point int32 [N]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tiar:
    """tib: the result. losses: stage -> loss over all timesteps, relative to the energy of the features."""

    tib: QuantizedTib
    losses: dict[str, float]


def tiar(
    graph: TemporalGraph,
    times: FiniteSet,
    bits: int,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    rate: float = RATE,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tiar:
    """Quantize a TIB to `bits` (8 or 4) per weight and 8 per activation.

    steps, batch, rate: of stage 2 (0 steps leave it out). progress: called with (done, total); what it raises passes
    through, and nothing that was given has changed. Works inside `torch.inference_mode`.
    """
    with torch.inference_mode(False), torch.no_grad():
        times = FiniteSet(times.points.clone())
        total = len(graph.layers) + steps
        tell = progress or (lambda done, total: None)
        targets = graph.features(times.points)
        losses: dict[str, float] = {}

        def judged(stage: str, codes: dict[str, Codes]) -> QuantizedTib:
            tib = calibrated(graph, times, bits, codes)
            losses[stage] = _loss(graph, targets, tib.features(times.points))
            return tib

        nearest = {path: _nearest(layer.weight, bits) for path, layer in graph.layers.items()}
        best = judged("nearest", nearest)
        fed = _error_feedback(graph, times, bits, targets, nearest, lambda done: tell(done, total))
        second = judged("feedback", {path: codes for path, (codes, _) in fed.items()})
        if losses["feedback"] <= losses["nearest"]:
            best = second
        if steps:
            joint = _Joint(graph, times, bits, targets, fed)
            for step in range(steps):
                joint.step(step, steps, batch, rate, seed)
                tell(len(graph.layers) + step + 1, total)
            third = judged("joint", joint.codes())
            if losses["joint"] < min(losses["feedback"], losses["nearest"]):
                best = third
    return Tiar(best, losses)


def _loss(graph: TemporalGraph, targets: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    error = sum(float((found[path] - targets[path]).double().square().sum()) for path in graph.outputs)
    return error / sum(float(targets[path].double().square().sum()) for path in graph.outputs)


def _nearest(weight: Tensor, bits: int) -> Codes:
    scale, zero = weight_grid(weight, bits)
    return weight_codes(weight, scale, zero, bits), scale, zero


# ---- stage 1 -------------------------------------------------------------------------------------------------------


def _error_feedback(
    graph: TemporalGraph,
    times: FiniteSet,
    bits: int,
    targets: dict[str, Tensor],
    grids: dict[str, Codes],
    tell: Callable[[int], None],
) -> dict[str, tuple[Codes, Tensor]]:
    """Path -> codes, and the real-valued place on the grid [N, K] that each of them was rounded from."""
    out: dict[str, tuple[Codes, Tensor]] = {}
    systems: dict[tuple[str, bool], _System] = {}

    def compute(path: str, x: Tensor) -> Tensor:
        layer = graph.layers[path]
        key = (layer.source, layer.silu)
        if key not in systems:
            systems[key] = _System(_fake_activation(x))
        target = targets[path] if layer.bias is None else targets[path] - layer.bias
        best, (codes, place, y) = float("inf"), (None, None, target)
        _, scale, zero = grids[path]
        for damping in DAMPINGS:
            trial = systems[key].solve(layer.weight, target, scale, zero, bits, damping)
            if trial is None:
                break
            error = float((trial[2] - target).double().square().sum())
            if not error < best:
                break
            best, (codes, place, y) = error, trial
        assert codes is not None and place is not None
        out[path] = ((codes, scale, zero), place)
        tell(len(out))
        return y if layer.bias is None else y + layer.bias

    graph.walk(graph.embed(times.points), compute)
    return out


class _System:
    """The normal equations of one layer input x [T, K], shared by all layers that read it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.gram = x.double().t() @ x.double()
        # Columns with the most energy first: they cost most when nothing is left to make up for them.
        self.order = self.gram.diagonal().argsort(descending=True)
        self.gram = self.gram[self.order][:, self.order]
        self.factors: dict[float, tuple[Tensor, Tensor] | None] = {}

    def solve(
        self, weight: Tensor, target: Tensor, scale: Tensor, zero: Tensor, bits: int, damping: float
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """weight [N, K] -> codes uint8 [N, K], what they were rounded from, and the output that they give [T, N]; None
        where the damping is too little for this input."""
        if damping not in self.factors:
            ridge = damping * self.gram.diagonal().mean().clamp_min(1e-12)
            pair = factors(self.gram + ridge * torch.eye(self.gram.shape[0]).to(self.gram))
            self.factors[damping] = None if pair is None else (pair[0].float(), pair[1].float())
        found = self.factors[damping]
        if found is None:
            return None
        inverse, upper = found
        # The float weight near it with the least || x w^T - target ||^2 (ridge regression).
        moved, rest = weight.clone(), (target - self.x @ weight.t()).t() @ self.x
        moved[:, self.order] += rest[:, self.order] @ inverse
        place = places(moved, scale.unsqueeze(1), zero.float().unsqueeze(1), 2**bits - 1, self.order, upper)
        codes = place.round().to(torch.uint8)
        return codes, place, self.x @ ((codes.float() - zero.unsqueeze(1)) * scale.unsqueeze(1)).t()


def _fake_activation(x: Tensor) -> Tensor:
    """x [T, K] rounded to the grid of its own timestep, in float."""
    scale, zero = (part.unsqueeze(1) for part in finite_set_grid(x))
    return (quantize_activation(x, scale, zero) - zero) * scale


# ---- stage 2 -------------------------------------------------------------------------------------------------------


class _Joint:
    """AdaRound of all layers at once, from the codes of stage 1."""

    def __init__(
        self,
        graph: TemporalGraph,
        times: FiniteSet,
        bits: int,
        targets: dict[str, Tensor],
        start: dict[str, tuple[Codes, Tensor]],
    ) -> None:
        self.graph, self.top = graph, 2**bits - 1
        self.embedded = graph.embed(times.points)
        self.targets = targets
        self.grids = {path: (scale, zero.float()) for path, ((_, scale, zero), _) in start.items()}
        self.floor: dict[str, Tensor] = {}
        self.alpha: dict[str, Tensor] = {}
        for path, ((codes, _, _), place) in start.items():
            floor = place.floor().clamp_(0, self.top - 1)
            up = codes.float() > floor
            h = torch.where(up, START, 1 - START)
            self.floor[path] = floor
            self.alpha[path] = alpha_of(h).requires_grad_()
        self.optimizer = torch.optim.Adam(self.alpha.values(), lr=1.0)

    def step(self, step: int, steps: int, batch: int, rate: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randperm(self.embedded.shape[0], generator=generator)[:batch].to(self.embedded.device)
        share = (step / steps - WARM_UP) / (1 - WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.enable_grad():
            found = self.graph.walk(self.embedded[rows], self._layer)
            loss = sum((found[p] - self.targets[p][rows]).square().sum(1).mean() for p in self.graph.outputs)
            if share > 0:
                beta = BETA[0] + (BETA[1] - BETA[0]) * share
                for alpha in self.alpha.values():
                    loss = loss + REGULARIZER * (1 - (2 * rectified(alpha) - 1).abs().pow(beta)).sum()
            self.optimizer.zero_grad()
            assert isinstance(loss, Tensor)
            loss.backward()
        self.optimizer.step()

    def _layer(self, path: str, x: Tensor) -> Tensor:
        x = x + (_fake_activation(x.detach()) - x).detach()  # straight through the rounding
        scale, zero = self.grids[path]
        weight = (self.floor[path] + rectified(self.alpha[path]) - zero.unsqueeze(1)) * scale.unsqueeze(1)
        return torch.nn.functional.linear(x, weight, self.graph.layers[path].bias)

    def codes(self) -> dict[str, Codes]:
        found = {}
        for path, alpha in self.alpha.items():
            scale, zero = self.grids[path]
            codes = self.floor[path] + (rectified(alpha.detach()) >= 0.5)
            found[path] = (codes.clamp(0, self.top).to(torch.uint8), scale, zero.to(torch.int32))
        return found
