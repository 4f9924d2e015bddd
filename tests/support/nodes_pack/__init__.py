"""Nodes for tests only: tiny models have no text encoder."""

from __future__ import annotations

import torch
from comfy_api.latest import ComfyExtension, io


class RandomConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TFMQTest_RandomConditioning",
            display_name="Random Conditioning (test)",
            category="TFMQ/test",
            is_dev_only=True,
            inputs=[
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF),
                io.Int.Input("tokens", default=7, min=1, max=1024),
                io.Int.Input("width", default=768, min=1, max=8192),
                io.Int.Input("pooled", default=0, min=0, max=8192, tooltip="Width of the pooled text; 0 for none."),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, seed: int, tokens: int, width: int, pooled: int) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        about = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        return io.NodeOutput([[torch.randn(1, tokens, width, generator=generator), about]])


class TestExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [RandomConditioning]


async def comfy_entrypoint() -> TestExtension:
    return TestExtension()
