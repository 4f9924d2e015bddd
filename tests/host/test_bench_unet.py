"""The UNets that bench/speed/ builds without a host have the host's own keys and shapes."""

import pytest
import torch

from bench.speed import unet
from devkit import inprocess

inprocess.load_pack()

import comfy.ops  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402

COMMON = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True,
    "legacy": False, "dtype": torch.float32, "device": "meta", "operations": comfy.ops.disable_weight_init,
}  # fmt: skip
HOST = {
    "sd15": {
        "num_res_blocks": [2] * 4, "channel_mult": (1, 2, 4, 4), "transformer_depth": [1] * 6 + [0, 0],
        "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1, "num_heads": 8,
        "context_dim": 768, "use_linear_in_transformer": False,
    },
    "sdxl": {
        "num_res_blocks": [2] * 3, "channel_mult": (1, 2, 4), "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10,
        "num_head_channels": 64, "num_heads": -1, "context_dim": 2048, "use_linear_in_transformer": True,
        "num_classes": "sequential", "adm_in_channels": 2816,
    },
}  # fmt: skip


@pytest.mark.parametrize("model", HOST)
def test_keys_and_shapes(model: str) -> None:
    theirs = UNetModel(**COMMON, **HOST[model])
    with torch.device("meta"):
        ours = unet.UNetModel(unet.CONFIGS[model])
    shapes = [{name: tuple(p.shape) for name, p in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_the_same_numbers_come_out() -> None:
    config = unet.Config(8, (1, 2), (1, 0), 1, 24, None, False, 0, channels=32, blocks=1)
    small = {
        "num_res_blocks": [1] * 2, "channel_mult": (1, 2), "transformer_depth": [1, 0],
        "transformer_depth_output": [1, 1, 0, 0], "transformer_depth_middle": 1, "num_heads": 8, "context_dim": 24,
        "use_linear_in_transformer": False,
    }  # fmt: skip
    ours, theirs = unet.UNetModel(config), UNetModel(**{**COMMON, "model_channels": 32, "device": "cpu"}, **small)
    unet.fill(ours)
    theirs.load_state_dict(ours.state_dict())
    x, t, context, _ = unet.inputs(config, 2, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, context), theirs(x, t, context), rtol=1e-3, atol=1e-3)
