"""The benchmark of what a leaf's own Python costs, for the leaves as the host has them."""

from bench import overhead
from support import patchers
from support.frames import frames


def test_every_case_has_a_figure() -> None:
    found = overhead.measure(f"{patchers.PACK}.", True, 10, 1)
    assert set(found) == set(overhead.CASES) and all(0.1 < figure < 10_000 for figure in found.values())


def test_few_frames_from_a_leaf_to_the_backend() -> None:
    found = frames(f"{patchers.PACK}.", True)
    way = ["forward", "integer_forward", "compute"]
    assert found == {"quantize_static": way, "multiply": way}
