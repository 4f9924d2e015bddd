"""The feed-forward networks of a quantized MODEL on a CPU compute in blocks, and the same."""

import copy

import pytest
import torch
from torch.nn import functional as F

from support import patchers, ties

ours = patchers.module("tfmq.host.faster.feed_forward")
rowwise = patchers.module("tfmq.runtime.row_blocks")
store = patchers.module("tfmq.host.store")
onednn = patchers.module("tfmq.kernels.onednn")
table = patchers.module("tfmq.kernels.table")
fused = patchers.module("tfmq.runtime.fused")
geometry = patchers.module("tfmq.geometry")

pytestmark = pytest.mark.rounding


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
    """As near to the two one after the other as float32 is, and not where somebody watches or changes either."""
    seen = []
    inner = onednn.multiply_gated

    def watched(codes, weight, bias):
        found = inner(codes, weight, bias)
        y = onednn.multiply(codes, weight, bias)
        value, gate = (part.double() for part in y.chunk(2, -1))
        # The sums are the same. GELU on both sides, the offset and the product: a few roundings of their largest.
        bound = 8 * ties.EPS * float(y.abs().max()) * (1 + gate.abs()) + ties.EPS * (value * gate).abs()
        assert bool(((found.double() - value * F.gelu(gate)).abs() <= bound).all())
        seen.append(1)
        return found

    monkeypatch.setattr(onednn, "multiply_gated", watched)
    network = quantized.model.diffusion_model
    found = patchers.sample(quantized)
    feeds = [module for module in network.modules() if type(module) is ours.FeedForward]
    first = next(leaf for path, leaf in patchers.leaves(quantized).items() if path.endswith("ff.net.0.proj"))
    if table.pick(table.LINEAR_STATIC, torch.device("cpu"), first.geometry).name != "onednn":
        pytest.skip("only oneDNN computes both in one")
    assert seen
    called = []
    for watch in (lambda feed: feed.net, lambda feed: feed.net[0], lambda feed: feed.net[0].proj):
        seen.clear()
        called.clear()
        hooks = [watch(feed).register_forward_hook(lambda *_: called.append(1)) for feed in feeds]
        apart = patchers.sample(quantized)
        for hook in hooks:
            hook.remove()
        assert called and not seen
    monkeypatch.setattr(ours.GEGLU, "forward", lambda self, x: self.proj(x).chunk(2, dim=-1)[0])
    assert patchers.distance(patchers.sample(quantized), apart) > 1e-2 and not seen
    monkeypatch.undo()
    assert torch.equal(patchers.sample(quantized), found)


def test_a_weight_in_two_parts_is_copied_saved_and_moved(quantized, tmp_path):
    found = patchers.sample(quantized)
    with patchers.files_in(tmp_path):
        loaded = store.load(str(store.save(quantized, "tfmq/parts")))
    assert torch.equal(patchers.sample(loaded), found)
    for path, leaf in patchers.leaves(quantized).items():
        if path.endswith("ff.net.0.proj"):
            twin = copy.deepcopy(leaf)
            assert torch.equal(twin.weight.dequantize(), leaf.weight.dequantize())
    quantized.model.diffusion_model.to("cpu")
    assert torch.equal(patchers.sample(quantized), found)


def test_a_lora_on_the_layer_comes_before_its_gate(quantized):
    """The leaf computes the gate of the sum, whatever it is made of."""
    leaf = next(leaf for path, leaf in patchers.leaves(quantized).items() if path.endswith("ff.net.0.proj"))
    x = torch.randn(1, 9, leaf.in_features)
    with torch.inference_mode():
        before = leaf(x)
        leaf.hooked = torch.randn(leaf.out_features, leaf.in_features) / leaf.in_features**0.5
        try:
            torch.testing.assert_close(leaf(x, fused.GATED), geometry.geglu(leaf(x)))
            assert float((leaf(x) - before).norm() / before.norm()) > 0.5
        finally:
            leaf.hooked = None
