"""The feed-forward networks of a quantized MODEL on a CPU compute in blocks, and the same."""

import pytest
import torch

from support import patchers

ours = patchers.module("tfmq.host.feed_forward")
rowwise = patchers.module("tfmq.rowwise")
store = patchers.module("tfmq.host.store")


def forwards(patcher):
    return [key for key in patcher.object_patches if key.endswith(".ff.forward")]


@pytest.fixture
def blocks(monkeypatch):
    """Which calls were for a part of the rows; blocks are of few rows here."""
    parts = []

    def watched(function, x, width, least=None):
        def seen(rows):
            parts.append(rows.numel() < x.numel())
            return function(rows)

        return in_blocks(seen, x, width, least)

    in_blocks = rowwise.in_blocks
    monkeypatch.setattr(rowwise, "LEAST_ROWS", 3)
    monkeypatch.setattr(rowwise, "BLOCK", 1)
    monkeypatch.setattr(ours, "in_blocks", watched)
    return parts


def test_blocks_change_nothing(quantized, blocks, monkeypatch):
    assert forwards(quantized)
    found = patchers.sample(quantized)
    assert any(blocks)
    monkeypatch.setattr(ours, "in_blocks", lambda function, x, *_: function(x))
    assert torch.equal(found, patchers.sample(quantized))


def test_the_base_is_as_before(base, quantized):
    """Of all layers: those whose norm is fused included."""
    patchers.sample(quantized)
    before = patchers.sample(base)
    for module in base.model.diffusion_model.modules():
        own = module.__dict__.get("forward")
        assert own is None or own.__func__ is type(module).forward
    patchers.sample(quantized)
    assert torch.equal(before, patchers.sample(base))


def test_a_loaded_file_has_them(quantized, blocks, tmp_path):
    with patchers.files_in(tmp_path):
        loaded = store.load(str(store.save(quantized, "tfmq/blocks")))
    assert forwards(loaded) == forwards(quantized)
    assert torch.equal(patchers.sample(loaded), patchers.sample(quantized))
    assert any(blocks)


def test_layers_that_decode_their_weight_at_every_call_run_whole(base):
    calibration = patchers.calibrate(base, 2)
    for recipe in ("W4A8", "W4A16"):
        assert not forwards(patchers.quantize(base, calibration, recipe))


def test_a_geglu_is_computed_with_its_layer(quantized, monkeypatch):
    """Near to what the two give one after the other, and not where somebody watches or changes either."""
    seen = []
    inner = ours.LeafCore._gates
    monkeypatch.setattr(ours.LeafCore, "_gates", lambda self, module: seen.append(self) or inner(self, module))
    found = patchers.sample(quantized)
    assert any(leaf.scheme.activation == "static" for leaf in seen)
    network = quantized.model.diffusion_model
    gates = [module for module in network.modules() if type(module) is ours.GEGLU]
    seen.clear()
    hooks = [gate.register_forward_hook(lambda *_: None) for gate in gates]
    apart = patchers.sample(quantized)
    for hook in hooks:
        hook.remove()
    assert not seen
    assert patchers.distance(found, apart) < 1e-3
    monkeypatch.setattr(ours.GEGLU, "forward", lambda self, x: self.proj(x).chunk(2, dim=-1)[0])
    assert patchers.distance(patchers.sample(quantized), apart) > 1e-2 and not seen
    monkeypatch.undo()
    assert torch.equal(patchers.sample(quantized), found)
