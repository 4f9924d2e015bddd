"""Which steps of a sampling run the observers see, by the rules of `observe.sampling_times`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..observe.sampling_times import NDTC, TRAJECTORY, UNIFORM, ndtc, nearest_steps, uniform_log_snr
from ..words import Choice

SHARE = 2  # of the steps, the rules that choose look at one in this number
POINTS = 1000


class StepChoice:
    """Says of every call of the network whether it counts. One per calibration; `start_run` before each prompt."""

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.run = 0
        self._steps: tuple[Tensor, set[int]] | None = None

    def start_run(self, number: int) -> None:
        self.run = number
        self._steps = None

    def __call__(self, sampling: Any, t: Tensor, sigmas: Tensor | None) -> bool:
        """sampling: the model_sampling; t [B]: timesteps of the call; sigmas [S + 1]: of the whole run."""
        choose = RULES[self.rule].value
        if choose is None or sigmas is None or len(sigmas) < 3:
            return True
        if self._steps is None:
            own = sampling.timestep(sigmas[:-1].to(t.device)).float().cpu()
            wanted = choose(sampling, own, max(1, own.numel() // SHARE), self.run)
            self._steps = own, set(nearest_steps(wanted, own).tolist())
        own, steps = self._steps
        # A solver that evaluates between two steps belongs to the nearer one.
        return int(nearest_steps(t[:1].cpu(), own)) in steps


def _ndtc(sampling: Any, own: Tensor, count: int, run: int) -> Tensor:
    return ndtc(count, float(own.min()), float(own.max()), seed=run)


def _uniform(sampling: Any, own: Tensor, count: int, run: int) -> Tensor:
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)
    sigma = torch.logspace(torch.tensor(max(low, 1e-4)).log10(), torch.tensor(high).log10(), POINTS)
    flow = "CONST" in {c.__name__ for c in type(sampling).__mro__}
    if flow:
        sigma = sigma.clamp(1e-4, 1 - 1e-4)
    log_snr = 2 * ((1 - sigma) / sigma).log() if flow else -2 * sigma.log()
    device = getattr(sampling, "sigmas", sigma).device
    return uniform_log_snr(count, sampling.timestep(sigma.to(device)).float().cpu(), log_snr)


# The value: model_sampling, timesteps of the run's steps [S], how many are wanted, number of the run -> timesteps [C].
RULES = {
    TRAJECTORY: Choice("all of them"),
    UNIFORM: Choice("half of them, evenly over the log signal-to-noise ratio", _uniform),
    NDTC: Choice("half of them, drawn from the normal distribution of PTQ4DM", _ndtc),
}
