"""The benchmark of what a leaf's own Python costs, for the leaves as the host has them."""

from bench import overhead
from support import patchers


def test_every_case_has_a_figure() -> None:
    found = overhead.measure(f"{patchers.PACK}.", True, 10, 1)
    assert set(found) == set(overhead.CASES) and all(0.1 < figure < 10_000 for figure in found.values())
