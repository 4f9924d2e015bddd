"""How much effort goes into the rounding of 4-bit weights."""

from __future__ import annotations

from ..words import Choice
from .adaround import Settings

NEAREST, FAST, BALANCED, BEST, BEST_PLUS = "nearest", "fast", "balanced", "best", "best+"
# No AdaRound: from the codes of the corrected error feedback it found nothing in hundreds of steps (measured).
_BALANCED = Settings(iterations=0, scale_iterations=150, batch=16, rate=1e-2)
# The value: settings of what is learnt block by block.
EFFORTS = {
    NEAREST: Choice("the nearest code; seconds"),
    FAST: Choice("GPTQ, later weights of a layer make up for each rounding error"),
    BALANCED: Choice(
        "GPTQ that makes up for the errors of earlier layers too, then scales tuned block by block; minutes for a "
        "small model, longer for a large one",
        _BALANCED,
    ),
    BEST: Choice(
        "rounding learnt block by block as well (AdaRound); days on a CPU",
        Settings(iterations=20_000, scale_iterations=5_000, batch=32, rate=1e-3),  # Q-Diffusion's
    ),
    BEST_PLUS: Choice(
        "balanced (not best), then scales and time embedding fine-tuned against the predictions of the float model",
        _BALANCED,
    ),
}
