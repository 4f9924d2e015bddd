"""Units are found in the structure of a network, whatever its classes are called."""

from __future__ import annotations

import pytest
from torch import nn

from support import tiny
from tfmq.rounding.units import Unit, find_units


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.ff = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))


def test_deepest_numbered_children_with_two_layers_and_everything_else_alone() -> None:
    network = nn.Module()
    network.stem = nn.Linear(4, 4)
    network.blocks = nn.ModuleList([nn.Sequential(Block(), nn.Linear(4, 4)), Block()])
    network.named = nn.ModuleDict({"a": Block()})
    layers = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    units = find_units(network, layers)
    assert [unit.path for unit in units] == ["stem", "blocks.0.0", "blocks.0.1", "blocks.1", "named.a"]
    assert units[1] == Unit("blocks.0.0", ("blocks.0.0.first", "blocks.0.0.ff.0", "blocks.0.0.ff.2"))
    assert units[2].layers == ("blocks.0.1",)
    # One layer of a block is no block.
    assert find_units(network, ["blocks.1.ff.2", "stem"]) == [
        Unit("stem", ("stem",)),
        Unit("blocks.1.ff.2", ("blocks.1.ff.2",)),
    ]


@pytest.mark.parametrize(
    ("model", "classes"),
    [
        (tiny.SD15, {"ResBlock", "BasicTransformerBlock"}),
        (tiny.SDXL, {"ResBlock", "BasicTransformerBlock"}),
        (tiny.FLUX, {"DoubleStreamBlock", "SingleStreamBlock"}),
        (tiny.SD3, {"JointBlock"}),
        (tiny.WAN, {"WanAttentionBlock"}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_blocks_of_the_hosts_networks(model: tiny.Tiny, classes: set[str]) -> None:
    import torch

    from devkit import inprocess

    inprocess.use_host()
    import comfy.ops

    with torch.device("meta"):
        network = model.build({"dtype": torch.float32, "device": "meta", "operations": comfy.ops.disable_weight_init})
    temporal = ("emb_layers", "mod", "time", "vector_in", "guidance_in", "t_embedder", "y_embedder", "label_emb")
    layers = [
        path
        for path, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not any(word in path for word in temporal)
    ]
    units = find_units(network, layers)
    blocks = {type(network.get_submodule(unit.path)).__name__ for unit in units if len(unit.layers) > 1}
    assert blocks == classes
    covered = [path for unit in units for path in unit.layers]
    assert sorted(covered) == sorted(layers)
