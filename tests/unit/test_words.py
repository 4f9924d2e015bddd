"""Words for people, and the tables that the options of nodes come from."""

import pytest
import torch

from tfmq.decide.grids import RANGES
from tfmq.formats.affine import SEARCHES, search_range
from tfmq.host.step_choice import RULES
from tfmq.observe.sampling_times import TRAJECTORY
from tfmq.rounding.efforts import EFFORTS
from tfmq.scheme import ACTIVATIONS, PRESETS, RECIPES, Recipe
from tfmq.words import Choice, Choices, counted, told


def test_counted() -> None:
    assert [counted(n, "layer") for n in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]


def test_told() -> None:
    assert told({"a": Choice("the first"), "b": Choice("the second", 2)}) == "a: the first. b: the second."


@pytest.mark.parametrize(
    ("choices", "names"),
    [
        (RANGES, ["mse", "percentile", "minmax", "one range", "tdq"]),
        (ACTIVATIONS, ["auto", "static", "dynamic"]),
        (EFFORTS, ["nearest", "fast", "balanced", "best", "best+"]),
        (RULES, ["trajectory", "uniform log-SNR", "NDTC"]),
        (
            RECIPES,
            [
                "W8A8", "W8A8 Linear only", "W4A8", "W4A16", "W4A16 NF4", "W4A16 FP4", "best under a size",
                "smallest at a quality",
            ],
        ),
    ],
)  # fmt: skip
def test_graphs_know_the_options_by_these_names(choices: Choices, names: list[str]) -> None:
    assert list(choices) == names
    assert all(choice.about and choice.about[-1] not in ".;," for choice in choices.values())


def test_the_first_option_is_the_default() -> None:
    firsts = [next(iter(choices)) for choices in (ACTIVATIONS, RANGES, EFFORTS)]
    assert [Recipe.activations, Recipe.ranges, Recipe.rounding] == firsts
    assert next(iter(RULES)) == TRAJECTORY and RULES[TRAJECTORY].value is None
    assert list(PRESETS) == list(RECIPES) == [choice.value.name for choice in RECIPES.values()]


def test_a_range_is_found_by_each_search_and_by_no_other() -> None:
    counts, low, high = torch.tensor([[0, 1, 9999, 999999, 9999, 1, 0, 0]]), torch.tensor([-4.0]), torch.tensor([4.0])
    found = {method: [float(end) for end in search_range(counts, low, high, method)] for method in SEARCHES}
    assert found["minmax"] == [-3.0, 2.0] and found["percentile"] == [-2.0, 1.0]
    assert -3.0 <= found["mse"][0] <= 0.0 <= found["mse"][1] <= 2.0
    with pytest.raises(ValueError, match="one range"):
        search_range(counts, low, high, "one range")
