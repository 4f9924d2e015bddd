"""Quantize a network in seconds: ranges of one call, nearest codes, no balance and no rotation. What it computes takes
the time of a calibrated one; its error is that of a plan which nobody would choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.speed.networks import chain_norms, kept_in_float, put
from tfmq.formats.affine import affine_grid, channel_scale, quantize_weight
from tfmq.geometry import Geometry, geometry_of
from tfmq.runtime.leaf import QuantConv2d, QuantLinear
from tfmq.runtime.run_state import RunState
from tfmq.scheme import STATIC, Scheme
from tfmq.state import LayerState
from tfmq.timeline import Partition, TimeAxis


def quantize(network: nn.Module, inputs: tuple[Any, ...]) -> int:
    """W8A8, static, in place of all layers that a recipe would quantize. inputs: x, t, ... of one call. Returns how
    many they are."""
    keep = kept_in_float(network)
    layers = {
        path: module for path, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and path not in keep
    }  # fmt: skip
    ends: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(path: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            ends[path] = torch.aminmax(given[0].float())

        return hook

    hooks = [module.register_forward_pre_hook(watch(path)) for path, module in layers.items()]
    try:
        network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    clock = RunState(TimeAxis(0.0, 999.0), Partition.uniform(1))
    count = 0
    for path, (low, high) in ends.items():
        module = layers.pop(path)
        geometry = geometry_of(module)
        if not isinstance(geometry, Geometry):
            continue
        grid = affine_grid(low.reshape(1), high.reshape(1))
        scale = channel_scale(module.weight)
        codes = quantize_weight(module.weight, scale)
        kind, leaf = ("conv2d", QuantConv2d) if geometry.is_conv else ("linear", QuantLinear)
        state = LayerState(kind, Scheme(activation=STATIC), geometry.shape, codes, scale, None, *grid)
        put(network, path, leaf(state, geometry, clock, module.bias))
        del module
        count += 1
    clock.set(inputs[1])
    chain_norms(network)
    return count
