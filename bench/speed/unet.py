"""The UNets of SD1.5 and SDXL in plain torch: layers, shapes and key names of the published checkpoints.

For measurements where no ComfyUI is at hand. Architecture: "High-Resolution Image Synthesis with Latent Diffusion
Models" (2112.10752) and "SDXL" (2307.01952); tests/host/test_bench_unet.py compares every key and shape with the
host's network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SUPPLY = (1 << 22) + 15  # of random numbers; a prime


@dataclass(frozen=True)
class Config:
    """depths: transformer blocks behind each residual block, level by level; `middle`: in the middle block.

    head_channels: per head, or None for 8 heads everywhere. `pooled`: width of the vector condition, or 0. `nchw`:
    every transformer leaves its image in that order, as the host's does, in a network that is channels last elsewhere.
    """

    latent: int
    multipliers: tuple[int, ...]
    depths: tuple[int, ...]
    middle: int
    context: int
    head_channels: int | None
    linear_projection: bool
    pooled: int
    channels: int = 320
    blocks: int = 2
    nchw: bool = False

    def heads(self, channels: int) -> int:
        return 8 if self.head_channels is None else channels // self.head_channels


CONFIGS = {
    "sd15": Config(64, (1, 2, 4, 4), (1, 1, 1, 0), 1, 768, None, False, 0),
    "sdxl": Config(128, (1, 2, 4), (0, 2, 10), 10, 2048, 64, True, 2816),
}
NCHW = "_nchw"


def config_of(model: str) -> Config:
    """By its name in CONFIGS, or that with NCHW behind it."""
    if model.endswith(NCHW):
        return replace(CONFIGS[model.removesuffix(NCHW)], nchw=True)
    return CONFIGS[model]


def apart(x: Tensor, heads: int) -> Tensor:
    """x [B, N, heads * d] -> [B, heads, N, d]."""
    return x.view(x.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2)


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sines and cosines of t [B] at geometric frequencies, float32 [B, channels]."""
    half = channels // 2
    frequencies = torch.exp(torch.arange(half, device=t.device).float() * (-math.log(10000) / half))
    angles = t.float().unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))
        self.attention: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (apart(y, self.heads) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(self.attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Dropout(0.0), nn.Linear(4 * channels, channels))
        self.width = 8 * channels

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        n = self.norm1(x)
        x = x + self.attn1(n, n)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context: int, heads: int, depth: int, linear: bool, nchw: bool = False) -> None:
        super().__init__()
        # Of the images that it makes.
        self.order = torch.contiguous_format if nchw else torch.channels_last
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.linear = linear

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, c, height, width = x.shape
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = h.movedim(1, 3).flatten(1, 2).contiguous()
        if self.linear:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear:
            h = self.proj_out(h)
        h = h.view(b, height, width, c).movedim(3, 1).contiguous(memory_format=self.order)
        if not self.linear:
            h = self.proj_out(h)
        return h + x


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Steps(nn.Sequential):
    """A block of the encoder or decoder: each module gets the condition that it knows."""

    def run(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for module in self:
            if isinstance(module, ResBlock):
                x = module(x, emb)
            elif isinstance(module, SpatialTransformer):
                x = module(x, context)
            else:
                x = module(x)
        return x


def _steps(module: nn.Module) -> Steps:
    assert isinstance(module, Steps)
    return module


class UNetModel(nn.Module):
    """x [B, 4, H, W], t [B], context [B, tokens, width], y [B, pooled] or None -> [B, 4, H, W]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        base, embedding = config.channels, 4 * config.channels
        self.time_embed = nn.Sequential(nn.Linear(base, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if config.pooled:
            pooled = nn.Sequential(nn.Linear(config.pooled, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
            self.label_emb = nn.Sequential(pooled)

        def transformer(channels: int, depth: int) -> list[nn.Module]:
            if not depth:
                return []
            heads = config.heads(channels)
            linear = config.linear_projection
            return [SpatialTransformer(channels, config.context, heads, depth, linear, config.nchw)]

        self.input_blocks = nn.ModuleList([Steps(nn.Conv2d(4, base, 3, padding=1))])
        skips, channels = [base], base
        levels = list(zip(config.multipliers, config.depths, strict=True))
        for level, (multiplier, depth) in enumerate(levels):
            for _ in range(config.blocks):
                block = ResBlock(channels, multiplier * base, embedding)
                channels = multiplier * base
                self.input_blocks.append(Steps(block, *transformer(channels, depth)))
                skips.append(channels)
            if level + 1 < len(levels):
                self.input_blocks.append(Steps(Downsample(channels)))
                skips.append(channels)
        self.middle_block = Steps(
            ResBlock(channels, channels, embedding), *transformer(channels, config.middle),
            ResBlock(channels, channels, embedding),
        )  # fmt: skip
        self.output_blocks = nn.ModuleList()
        for level, (multiplier, depth) in reversed(list(enumerate(levels))):
            for index in range(config.blocks + 1):
                block = ResBlock(channels + skips.pop(), multiplier * base, embedding)
                channels = multiplier * base
                up = [Upsample(channels)] if level and index == config.blocks else []
                self.output_blocks.append(Steps(block, *transformer(channels, depth), *up))
        self.out = nn.Sequential(nn.GroupNorm(32, base), nn.SiLU(), nn.Conv2d(base, 4, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(timestep_embedding(t, self.config.channels).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = _steps(block).run(x, emb, context)
            skips.append(x)
        x = self.middle_block.run(x, emb, context)
        for block in self.output_blocks:
            x = _steps(block).run(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)


def inputs(
    config: Config, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Random x, t, context (77 tokens) and y of one step."""
    g = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    x = random(batch, 4, config.latent, config.latent).contiguous(memory_format=torch.channels_last)
    t = torch.full((batch,), 500.0, device=device)
    return x, t, random(batch, 77, config.context), random(batch, config.pooled) if config.pooled else None


@torch.no_grad()
def fill(network: nn.Module, seed: int = 0) -> None:
    """Random weights under which activations keep unit size: variance 1 / inputs, small biases, norms of gain 1."""
    g = torch.Generator().manual_seed(seed)
    # Cut from one supply, whose length no layer's divides: to draw them all would take longer than to measure.
    supply = torch.randn(SUPPLY, generator=g).to(next(network.parameters()).device)

    def random(shape: torch.Size) -> Tensor:
        start = int(torch.randint(SUPPLY, (), generator=g))
        return supply.roll(start).repeat(-(-shape.numel() // SUPPLY))[: shape.numel()].view(shape)

    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            w = module.weight
            w.copy_(random(w.shape) / math.sqrt(w[0].numel()))
            if module.bias is not None:
                module.bias.copy_(0.1 * random(module.bias.shape))
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.weight.fill_(1.0)
            module.bias.zero_()
