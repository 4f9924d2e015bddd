"""The outlier variant computes the same function, with outliers where they are meant to be."""

import pytest
import torch
from torch import nn

from bench.quality.outliers import LEAST, MOST, SHARE, add_outliers
from support import tiny

SEED = 3


@pytest.fixture(scope="module")
def run():
    """Output of the tiny SD1.5 UNet and the inputs of its layers: before, after, and what was scaled."""
    network = tiny.build(tiny.SD15)
    before = _run(network)
    weights = {name: p.clone() for name, p in network.named_parameters()}
    scaled = add_outliers(network, SEED)
    return network, before, _run(network), weights, scaled


def _run(network: nn.Module):
    inputs = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, path=path: inputs.__setitem__(path, args[0].clone()))
        for path, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 7, 768)))
    with torch.no_grad():
        output = network(x, torch.tensor([10.0, 700.0]), context)
    for handle in handles:
        handle.remove()
    return output, inputs


def _peaks(x: torch.Tensor) -> torch.Tensor:
    rows = x.movedim(1, -1) if x.dim() == 4 else x
    return rows.flatten(0, -2).abs().amax(0)


def test_the_function_stays_to_float_precision(run):
    _, (before, _), (after, _), _, _ = run
    assert float((after - before).norm() / before.norm()) < 2e-5


@pytest.mark.parametrize(
    "layer",
    [
        "proj_in", "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_v",
        "transformer_blocks.0.attn2.to_q", "transformer_blocks.0.attn1.to_out.0", "transformer_blocks.0.attn2.to_out.0",
        "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2",
    ],
)  # fmt: skip
def test_the_readers_see_a_few_wide_channels(run, layer):
    _, (_, before), (_, after), _, _ = run
    path = f"input_blocks.1.1.{layer}"
    ratio = _peaks(after[path]) / _peaks(before[path])
    wide = ratio > LEAST * 0.99
    assert int(wide.sum()) == round(SHARE * len(ratio))
    assert float(ratio.max()) < MOST * 1.01
    torch.testing.assert_close(ratio[~wide], torch.ones(int((~wide).sum())), rtol=1e-3, atol=0)


def test_only_what_the_docstring_names_is_changed(run):
    network, _, _, weights, scaled = run
    changed = {n for n, p in network.named_parameters() if not torch.equal(p, weights[n])}
    allowed = (
        "norm.",
        "norm1.",
        "norm2.",
        "norm3.",
        "proj_in.",
        "to_q.",
        "to_k.",
        "to_v.",
        "to_out.0.",
        "net.0.proj.",
        "net.2.",
    )
    assert all(any(part in name for part in allowed) and ".1." in name for name in changed)
    assert not [name for name in changed if "emb" in name or name.startswith(("out.", "input_blocks.0."))]
    assert set(scaled) == {name.rpartition(".")[0] for name in changed} & set(scaled)
    # The gate of GEGLU goes through a GELU and must not be scaled.
    gate = "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight"
    half = len(weights[gate]) // 2
    wide = scaled["input_blocks.1.1.transformer_blocks.0.norm3"]
    same_columns = (dict(network.named_parameters())[gate][half:] == weights[gate][half:]).all(0)
    assert int((~same_columns).sum()) == wide


def test_the_seed_decides(run):
    network, _, _, _, _ = run
    again, other = tiny.build(tiny.SD15), tiny.build(tiny.SD15)
    add_outliers(again, SEED)
    add_outliers(other, SEED + 1)
    name = "input_blocks.1.1.norm.weight"
    mine = dict(network.named_parameters())[name]
    assert torch.equal(dict(again.named_parameters())[name], mine)
    assert not torch.equal(dict(other.named_parameters())[name], mine)


def test_another_kind_of_network_is_refused():
    with pytest.raises(ValueError, match="outlier variant"):
        add_outliers(nn.Sequential(nn.Linear(4, 4)))
