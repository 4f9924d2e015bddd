"""Tells the leaves of a model which interval the call that begins belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..timeline import Clock


class ClockWrapper:
    """APPLY_MODEL wrapper: one signature for every architecture, sigma in, and it runs once per call of the network."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, executor: Callable[..., Any], x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.clock.set(timesteps(executor, sigma))
        return executor(x, sigma, *args, **kwargs)


def timesteps(executor: Any, sigma: Tensor) -> Tensor:
    """Sigmas of one call [B] -> the timesteps that the network receives, float32 [B]."""
    return executor.class_obj.model_sampling.timestep(sigma).float()
