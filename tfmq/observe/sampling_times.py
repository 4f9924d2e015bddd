"""Where on the time axis a calibration looks: which steps of a sampling run the observers see.

Three rules. All of them name steps of a real run by the timestep that the network receives, so the latents of a step
and its label t always belong together. (PTQ4DM's public script takes the number of the loop for t: it hands the network
the noisiest latents with the label of the cleanest, and the other way round.)
"""

from __future__ import annotations

import torch
from torch import Tensor

TRAJECTORY, UNIFORM, NDTC = "trajectory", "uniform log-SNR", "NDTC"
NDTC_MEAN, NDTC_DEVIATION = 0.4, 0.4


def uniform_log_snr(count: int, points: Tensor, log_snr: Tensor) -> Tensor:
    """`count` timesteps whose log signal-to-noise ratios are evenly spaced between the ends.

    points [P]: timesteps; log_snr [P]: log of their signal-to-noise ratio, monotone in t and finite. For an epsilon
    model with sigmas of noise over signal it is -2 log sigma; for a flow model 2 log((1 - sigma) / sigma).
    Raises ValueError for values that are not finite.
    """
    _check(count)
    if not bool(torch.isfinite(log_snr).all()):
        raise ValueError("log_snr must be finite: leave out the timesteps without any noise or any signal")
    wanted = torch.linspace(float(log_snr.min()), float(log_snr.max()), count, dtype=torch.float64)
    return points.float()[(log_snr.double().unsqueeze(0) - wanted.unsqueeze(1)).abs().argmin(1)]


def ndtc(
    count: int,
    low: float,
    high: float,
    seed: int = 0,
    mean: float = NDTC_MEAN,
    deviation: float = NDTC_DEVIATION,
) -> Tensor:
    """`count` timesteps of a normal distribution over [low, high] (PTQ4DM, 2211.15736, algorithm 1), float32.

    mean, deviation: as shares of the span, 0.4 and 0.4 in the released script. Draws beyond the ends are drawn again;
    the script moves them to the ends, where with these numbers 16 % and 7 % of all samples would pile up.
    """
    _check(count)
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(0)
    while found.numel() < count:
        draw = torch.randn(4 * count, generator=generator) * deviation + mean
        found = torch.cat([found, draw[(draw >= 0) & (draw <= 1)]])
    return low + found[:count] * (high - low)


def nearest_steps(wanted: Tensor, timesteps: Tensor) -> Tensor:
    """Numbers of the steps of a run (timesteps [S], any order) at which the network sees a t nearest to each wanted
    one; int64, same length as `wanted`, repeats included. This is what to observe: x and t of that very step."""
    return (timesteps.double().unsqueeze(0) - wanted.double().unsqueeze(1)).abs().argmin(1)


def _check(count: int) -> None:
    if count < 1:
        raise ValueError(f"at least one timestep is wanted, got {count}")
