"""Layers of a quantized MODEL that read one tensor quantize it once."""

import re
from collections import Counter

import pytest
import torch

from support import patchers

shared_input = patchers.module("tfmq.runtime.shared_input")
store = patchers.module("tfmq.host.store")


@pytest.fixture
def made(monkeypatch):
    """Leaf -> how often it made codes that others may use."""
    found = Counter()
    read = shared_input.SharedInput.read

    def counted(self, own, x, backend):
        shares = read(self, own, x, backend)
        if shares and self.codes is None:
            found[own] += 1
        return shares

    monkeypatch.setattr(shared_input.SharedInput, "read", counted)
    return found


def attentions(patcher):
    """Path -> its leaves q, k, v."""
    found = {}
    for path, layer in patchers.leaves(patcher).items():
        match = re.fullmatch(r"(.*\.attn[12])\.to_([qkv])", path)
        if match:
            found.setdefault(match[1], {})[match[2]] = layer
    return found


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_q_k_and_v_quantize_their_input_once(base, calibration, made, monkeypatch, activations):
    quantized = patchers.quantize(base, calibration, activations=activations)
    patchers.sample(quantized)  # they learn of each other
    made.clear()
    found = patchers.sample(quantized, steps=3)
    several = {path: own for path, own in attentions(quantized).items() if len(own) == 3}
    assert any("attn1" in path for path in several) and any("attn2" in path for path in several)
    for path, own in several.items():
        readers = "qkv" if "attn1" in path else "kv"
        assert len({own[name].reading for name in readers}) == 1, path
        counts = [made[own[name]] for name in "qkv"]
        # The host repeats a picture with nothing of its own in a batch, so 3 steps are 3 calls.
        assert counts == ([3, 0, 0] if "attn1" in path else [0, 3, 0]), path
    assert sum(made.values()) == 3 * len(several)
    monkeypatch.setattr(shared_input.SharedInput, "read", lambda *_: False)
    assert torch.equal(patchers.sample(quantized, steps=3), found)


def test_a_loaded_file_shares_as_well(quantized, made, tmp_path):
    with patchers.files_in(tmp_path):
        loaded = store.load(str(store.save(quantized, "tfmq/siblings")))
    for path, layer in patchers.leaves(quantized).items():
        assert patchers.leaves(loaded)[path].reading == layer.reading, path
    patchers.sample(loaded)
    made.clear()
    found = patchers.sample(loaded)
    assert made and all(layer.readers > 1 for layer in made)
    assert torch.equal(found, patchers.sample(quantized))
