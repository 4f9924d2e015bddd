"""The benchmark of what a leaf's own Python costs."""

import json
import sys

import pytest
import torch

from bench import overhead
from support.frames import frames


def test_every_case_has_a_figure(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def no_host() -> None:
        raise FileNotFoundError("not here")

    monkeypatch.setattr(overhead.inprocess, "load_pack", no_host)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    for label in ("before", "after"):
        command = ["overhead", "--calls", "10", "--rounds", "1", "--label", label, "--json", str(tmp_path / "o.json")]
        monkeypatch.setattr(sys, "argv", command)
        overhead.main()
    found = json.loads((tmp_path / "o.json").read_text())
    assert set(found) == {"machine", "before", "after"} and set(found["after"]) == {"core"}
    assert set(found["after"]["core"]) == set(overhead.CASES)
    assert all(0.1 < figure < 10_000 for figure in found["after"]["core"].values())


def test_few_frames_from_a_leaf_to_the_backend() -> None:
    assert frames("", False) == {name: ["forward", "compute"] for name in ("quantize_static", "multiply")}
