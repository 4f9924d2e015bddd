"""The leaves as ComfyUI's patcher wants them."""

from __future__ import annotations

from typing import Any

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn
from torch.nn import functional as F

from ...formats.int4 import Packed
from ...geometry import Geometry
from ...runtime.fused import PLAIN, Fused
from ...runtime.leaf import LeafCore
from ...runtime.run_state import RunState
from ...scheme import INT, NONE
from ...state import LayerState
from . import nf4
from .base import HostLeaf
from .layout import codes_of, packed, quantized_tensor, reordered
from .residual import Residual


class HostQuantLeaf(HostLeaf, LeafCore):
    """A solved layer. bias: float [N] or None; dtype: that of the float weight."""

    def __init__(
        self, state: LayerState, geometry: Geometry, clock: RunState, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(state, geometry, clock)
        self.hold_weight(quantized_tensor(state, dtype), bias)

    def integer_forward(self, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, fused: Fused = PLAIN) -> Tensor:
        if self.scheme.activation == NONE:
            return fused.after(self._decoded(fused.before(x), weight, bias))
        own = self._owner()
        key: QuantizedTensor | None = own
        if weight is not own and weight._qdata is not own._qdata:
            # What dynamic loading keeps on the device it hands over as the same object at every call.
            key = weight if weight is getattr(self, "_v_weight", None) else None
        return self.compute(x, key, weight, bias, fused)

    def _decoded(self, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        """The layer with its input in float."""
        return self.float_forward(x, weight.dequantize().to(x.dtype), bias)

    def _owner(self) -> QuantizedTensor:
        return self._parameters["weight"]

    def _stored(self, weight: QuantizedTensor) -> tuple[Tensor | Packed, Tensor]:
        qdata, params = weight._qdata, weight._params
        return packed(qdata, params) if self.scheme.weight_bits == 4 else codes_of(qdata), params.scale

    def _keep(self, same: Tensor) -> None:
        self._owner()._qdata = reordered(same)

    def _apply(self, fn: Any, recurse: bool = True) -> HostQuantLeaf:
        # What was prepared on one device would stay there when the weight leaves.
        self._prepared = self._sums = None
        super()._apply(fn, recurse)
        return self


class QuantLinear(HostQuantLeaf):
    """Stands in for a Linear; same attributes, same keys."""

    def __init__(self, module: nn.Linear, state: LayerState, geometry: Geometry, clock: RunState, **own: Any) -> None:
        super().__init__(state, geometry, clock, **own)
        self.in_features = module.in_features
        self.out_features = module.out_features

    def _decoded(self, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        if self.scheme.weight_format != INT:
            return nf4.linear(x, weight, bias)
        return super()._decoded(x, weight, bias)

    def float_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def residual_forward(self, x: Tensor, residual: Residual) -> Tensor:
        return residual.linear(x)


class QuantConv2d(HostQuantLeaf):
    """Stands in for a Conv2d; same attributes, same keys."""

    def __init__(self, module: nn.Conv2d, state: LayerState, geometry: Geometry, clock: RunState, **own: Any) -> None:
        super().__init__(state, geometry, clock, **own)
        for name in (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
        ):  # fmt: skip
            setattr(self, name, getattr(module, name))

    def float_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        g = self.geometry
        return F.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)

    def residual_forward(self, x: Tensor, residual: Residual) -> Tensor:
        return residual.conv2d(x, self.geometry)


def make_leaf(
    module: nn.Module, state: LayerState, geometry: Geometry, clock: RunState, bias: Tensor | None, dtype: torch.dtype
) -> QuantLinear | QuantConv2d:
    """The leaf for `module`. bias: float [N] or None; dtype: that of the float weight."""
    if isinstance(module, nn.Conv2d):
        return QuantConv2d(module, state, geometry, clock, bias=bias, dtype=dtype)
    assert isinstance(module, nn.Linear)
    return QuantLinear(module, state, geometry, clock, bias=bias, dtype=dtype)
