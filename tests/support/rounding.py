"""Layers of a small network as reconstruction wants them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tfmq.formats.affine import affine_grid
from tfmq.geometry import Geometry, geometry_of
from tfmq.rounding.layer import Layer
from tfmq.scheme import STATIC, Scheme


def four_bit_layers(
    network: nn.Module, plan: Mapping[str, str], run: Callable[[], object], intervals: int, bits: int = 8
) -> dict[str, Layer]:
    """plan: path -> activation. run: calls the network on what the static ranges are to span. bits: of activations."""
    inputs: dict[str, Tensor] = {}
    modules = {path: network.get_submodule(path) for path in plan}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: inputs.__setitem__(path, args[0]))
        for path, module in modules.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    found = {}
    for path, activation in plan.items():
        geometry = geometry_of(modules[path])
        assert isinstance(geometry, Geometry)
        group = min(16, geometry.shape[1])
        layer = Layer(Scheme(4, bits, activation, group=group), geometry, modules[path].bias)
        if activation == STATIC:
            low, high = (torch.full((intervals,), float(v)) for v in torch.aminmax(inputs[path]))
            layer.act_scale, layer.act_zero_point = affine_grid(low, high, bits)
        found[path] = layer
    return found
