"""Which layer gets how many bits: the least error in a number of bytes, or the fewest bytes for an error.

Every layer offers options, each with its bytes and its error: the squared error that this layer alone brings into the
network's prediction. Errors of different layers are taken as independent, so that their squares add up. A
multiple-choice knapsack; solved on the convex hulls of the options by price, then filled up greedily (TMPQ-DM,
2404.09532, searches the same space by evolution).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple


class Option(NamedTuple):
    """bits of the weight, bytes of the layer, squared error of the prediction relative to its energy."""

    bits: int
    size: int
    error: float


Choices = Mapping[str, Sequence[Option]]


def least_error(choices: Choices, budget: int) -> dict[str, Option] | None:
    """The plan with the least summed error in at most `budget` bytes, or None if even the smallest is larger."""
    plan = {path: min(options, key=lambda o: (o.size, o.error)) for path, options in choices.items()}
    room = budget - sum(option.size for option in plan.values())
    if room < 0:
        return None
    hulls = {path: hull(options) for path, options in choices.items()}
    for path, options in hulls.items():
        plan[path] = options[0]
    # Steps along the hulls, the one that buys the most error per byte first: within a hull these come in order.
    steps = [
        ((a.error - b.error) / (b.size - a.size), path, b)
        for path, options in hulls.items()
        for a, b in pairwise(options)
    ]
    for _, path, option in sorted(steps, key=lambda step: -step[0]):
        more = option.size - plan[path].size
        if 0 < more <= room:
            plan[path] = option
            room -= more
    return _filled(choices, plan, room)


def fewest_bytes(choices: Choices, error: float) -> dict[str, Option] | None:
    """The smallest plan that is found with at most this summed error, or None if even the most exact one exceeds it."""
    if sum(min(o.error for o in options) for options in choices.values()) > error:
        return None
    low = sum(min(o.size for o in options) for options in choices.values())
    high = sum(max(o.size for o in options) for options in choices.values())
    best = None
    while low <= high:
        middle = (low + high) // 2
        plan = least_error(choices, middle)
        if plan is not None and total_error(plan) <= error:
            best, high = plan, min(middle, total_size(plan)) - 1
        else:
            low = middle + 1
    if best is None:  # the most exact plan holds; the search by price may miss it by a hair
        best = {path: min(options, key=lambda o: (o.error, o.size)) for path, options in choices.items()}
    return best


def total_size(plan: Mapping[str, Option]) -> int:
    return sum(option.size for option in plan.values())


def total_error(plan: Mapping[str, Option]) -> float:
    return sum(option.error for option in plan.values())


def hull(options: Sequence[Option]) -> list[Option]:
    """Options on the lower convex hull of error over bytes, by ascending bytes and falling error."""
    out: list[Option] = []
    for option in sorted(options, key=lambda o: (o.size, o.error)):
        if out and option.error >= out[-1].error:
            continue
        while len(out) > 1 and _slope(out[-2], out[-1]) <= _slope(out[-2], option):
            out.pop()
        out.append(option)
    return out


def _slope(a: Option, b: Option) -> float:
    """Error that a byte buys between two options."""
    return (a.error - b.error) / (b.size - a.size)


def _filled(choices: Choices, plan: dict[str, Option], room: int) -> dict[str, Option]:
    """Spend what room is left: the single change that helps most, again and again."""
    while True:
        best: tuple[float, str, Option] | None = None
        for path, options in choices.items():
            for option in options:
                gain = plan[path].error - option.error
                if gain > 0 and option.size - plan[path].size <= room and (best is None or gain > best[0]):
                    best = gain, path, option
        if best is None:
            return plan
        room -= best[2].size - plan[best[1]].size
        plan[best[1]] = best[2]
