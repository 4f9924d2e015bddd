"""Tells the leaves of a model where on the time axis the call that begins is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..timeline import Clock


class ClockWrapper:
    """APPLY_MODEL wrapper: one signature for every architecture, sigma in, and it runs once per call of the network."""

    def __init__(self, *clocks: Clock) -> None:
        self.clocks = clocks

    def __call__(self, executor: Callable[..., Any], x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Any:
        t, rows = timesteps(executor, sigma), branches(args, kwargs)
        for clock in self.clocks:
            clock.set(t.to(x.device), rows)  # of several calls at a time, one per device
        return executor(x, sigma, *args, **kwargs)


def branches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Which equal share of the batch of a call is conditional (0) and which unconditional (1), in order.

    args, kwargs: of `apply_model` behind x and sigma: c_concat, c_crossattn, control, transformer_options, ...
    """
    return tuple(_options(args, kwargs).get("cond_or_uncond") or (0,))


def sample_sigmas(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The sigmas of the whole run [S + 1], where the host tells them; arguments as of `branches`."""
    return _options(args, kwargs).get("sample_sigmas")


def _options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs.get("transformer_options") or (args[3] if len(args) > 3 else {})


def timesteps(executor: Any, sigma: Tensor) -> Tensor:
    """Sigmas of one call [B] -> the timesteps that the network receives, float32 [B]."""
    return executor.class_obj.model_sampling.timestep(sigma).float()
