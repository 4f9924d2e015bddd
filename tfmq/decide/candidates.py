"""How one layer could be represented, what each way costs, and which is taken.

The rule for the activations of a Linear layer (`activations="auto"`). Both errors come from the calibration, on the
same balanced input, energy-weighted over the intervals: of a static affine grid per interval (range method of the
recipe) and of per-token affine quantization. Static is chosen if

    error(static)^2 <= error(dynamic)^2 * cost(dynamic),

and the input has no heavy tail (largest magnitude over the 99.9th percentile at most 3: beyond that a handful of
entries carry the layer, and other prompts bring larger ones than the calibration saw). Errors are relative L2, cost =
time of a dynamic layer over a static one as the backend of this machine declares it.

A Linear is rotated (`rotation`) where that halves the squared error of its input, quantized as this rule says, or the
sum of this and the weight's, and does not raise the sum. In it the weight's, as far as error feedback leaves it, counts
`balance.WEIGHT_SHARE` times. The squared error of the rotated input is multiplied by the time of the layer with a
rotation over that without one.

Where the recipe leaves convolutions in float, these take most of the time, and neither cost is counted; there a fifth
less error is enough for a rotation.

A static layer gets a grid of its own for conditional and unconditional rows where that lowers the squared error by
a fifth or more (`observe.branches`). A convolution is always static: its inputs overlap, so that no scale per token
exists.
"""

from __future__ import annotations

import torch

from ..formats.affine import bin_centers
from ..formats.hadamard import group_of
from ..formats.int4 import group_for
from ..kernels.costs import FREE, Costs
from ..observe.balance import WEIGHT_SHARE
from ..observe.statistics import LayerStatistics
from ..runtime.branches import BRANCHES
from ..scheme import DYNAMIC, INT, NONE, ONE_RANGE, STATIC, TDQ, Recipe, Scheme
from .grids import grid_error, static_grid

HEAVY_TAIL = 3.0


# Ratio of squared errors below which a layer is rotated, beside float and beside integer convolutions, whose errors
# drown what is between the two.
ROTATION_WORTHWHILE, ROTATION_WORTH_TIME = 0.8, 0.5


# Of the squared error of 8-bit weights rounded to nearest, what GPTQ leaves: docs/decisions/gptq-for-8-bit-weights.md.
AFTER_FEEDBACK = 1 / 7


def scheme_of(recipe: Recipe, statistics: LayerStatistics, weight_bits: int, costs: Costs = FREE) -> tuple[Scheme, str]:
    """Scheme of one layer at `weight_bits` per weight, and the reason in a line."""
    if recipe.weight_format != INT and statistics.kind == "linear" and (weight_bits, recipe.activation_bits) == (4, 16):
        return Scheme(4, 16, NONE, weight_format=recipe.weight_format), "weight alone"
    group, note = 0, ""
    if weight_bits == 4:
        group = group_for(statistics.shape[1], recipe.group)
        if not group:
            weight_bits, note = 8, f"; 8 bits: {statistics.shape[1]} input channels do not divide into groups"
        elif group != recipe.group:
            note = f"; groups of {group}: {recipe.group} do not divide {statistics.shape[1]} input channels"
    if recipe.activation_bits == 16:
        return Scheme(weight_bits, 16, NONE, group=group), f"weight alone{note}"
    activation, rotated, reason = _activation(recipe, statistics, weight_bits, costs)
    seen = statistics.rotated if rotated and statistics.rotated is not None else statistics
    apart = activation == STATIC and recipe.branches_apart and seen.branches is not None
    apart = apart and recipe.ranges not in (ONE_RANGE, TDQ)
    scheme = Scheme(
        weight_bits,
        recipe.activation_bits,
        activation,
        statistics.balance is not None,
        BRANCHES if apart else 1,
        group_of(statistics.shape[1]) if rotated else 0,
        group,
        permuted=rotated and statistics.permutations is not None,
    )
    return scheme, reason + note


def static_error(statistics: LayerStatistics, method: str, bits: int = 8) -> float:
    """Relative L2 error of the static grids on the calibration data, over all intervals."""
    return grid_error(statistics, static_grid(statistics, method, bits), bits)


def dynamic_error(statistics: LayerStatistics, bits: int = 8) -> float:
    """Relative L2 error of per-token quantization on the calibration data, over all intervals.

    Observed with 8 bits; rounding errors of fewer bits are taken as proportional to the step.
    """
    sums = statistics.row_error.sum(0)
    return float((sums[0] / sums[1].clamp_min(1e-30)).sqrt()) * 255 / (2**bits - 1)


def tail_ratio(statistics: LayerStatistics) -> float:
    """Largest magnitude seen over the 99.9th percentile of the magnitudes, over all intervals."""
    counts = statistics.histogram.double()
    centers = bin_centers(counts, statistics.bin_low, statistics.bin_high).abs().flatten()
    order = centers.argsort()
    share = counts.flatten()[order].cumsum(0) / counts.sum().clamp_min(1)
    at = int((share < 0.999).sum().clamp_max(len(order) - 1))
    seen = counts.sum(1) > 0
    reach = torch.maximum(-statistics.low[seen], statistics.high[seen]).max()
    return float(reach / centers[order][at].clamp_min(1e-30))


def _activation(recipe: Recipe, statistics: LayerStatistics, weight_bits: int, costs: Costs) -> tuple[str, bool, str]:
    """Static or dynamic, whether rotated, and why."""
    if statistics.kind == "conv2d":
        return STATIC, False, "convolution"
    worthwhile = ROTATION_WORTH_TIME
    if not recipe.convolutions:
        costs, worthwhile = FREE, ROTATION_WORTHWHILE
    dynamic_cost = costs.per_token(statistics.shape[1])
    choice, error, reason = _kind(recipe, statistics, dynamic_cost)
    if statistics.rotated is None:
        return choice, False, reason
    rotated_choice, rotated_error, _ = _kind(recipe, statistics.rotated, dynamic_cost)
    time = dynamic_cost if rotated_choice == DYNAMIC else 1.0
    permutations = 0 if statistics.permutations is None else len(statistics.permutations)
    shape, balanced = statistics.shape, statistics.balance is not None
    rotated_error *= 1 + costs.of_rotation(shape, group_of(shape[1]), permutations, balanced) / time
    weights = 0.0, 0.0
    if statistics.weight_error is not None:
        share = WEIGHT_SHARE * AFTER_FEEDBACK if weight_bits == 8 else WEIGHT_SHARE
        plain, after = statistics.weight_error[:, 0 if weight_bits == 8 else 1].tolist()
        weights = share * plain, share * after
    ratio = (rotated_error + weights[1]) / max(error + weights[0], 1e-30)
    if ratio > 1 or min(ratio, rotated_error / max(error, 1e-30)) > worthwhile:
        return choice, False, reason
    how = "" if statistics.permutations is None else f" with permutations ({len(statistics.permutations)})"
    return rotated_choice, True, f"{reason}; {rotated_choice} and rotated{how}: squared error x{ratio:.2f}"


def _kind(recipe: Recipe, statistics: LayerStatistics, dynamic_cost: float) -> tuple[str, float, str]:
    """Static or dynamic for the input that `statistics` are about, its relative squared error at that cost, and why."""
    counted = bool((statistics.histogram > 0).any())
    dynamic = dynamic_error(statistics, recipe.activation_bits)
    static = static_error(statistics, recipe.ranges, recipe.activation_bits) if counted else float("inf")
    if recipe.activations in (STATIC, DYNAMIC):
        error = static if recipe.activations == STATIC else dynamic
        return recipe.activations, error**2, "asked for"
    tail = tail_ratio(statistics) if counted else float("inf")
    choice = STATIC if static**2 <= dynamic**2 * dynamic_cost and tail <= HEAVY_TAIL else DYNAMIC
    error = static**2 if choice == STATIC else dynamic**2 * dynamic_cost
    reason = f"error static {static:.2e}, per token {dynamic:.2e}, cost of per token x{dynamic_cost:.2f}"
    return choice, error, f"{reason}, tail {tail:.1f}"
