"""The leaves as ComfyUI's patcher wants them: a module without children, one weight, one bias, castable.

How a weight is streamed, patched and evicted is the host's business; what it asks of a leaf for that is in
docs/leaf.md.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import comfy.ops
import torch
from comfy.model_patcher import LowVramPatch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn
from torch.nn import functional as F

from ...geometry import Geometry, Norm, geglu
from ...runtime.leaf import TABLES, LeafCore
from ...scheme import INT, NONE
from ...state import LayerState
from ...timeline import Clock
from . import nf4
from .layout import codes_of, packed, quantized_tensor, reordered
from .residual import Residual


class _WithoutPatches(list):
    """Weight functions, less the merging of patches: a patch is in `residuals` already and would count twice."""

    def append(self, function: Any) -> None:
        if not isinstance(function, LowVramPatch):
            super().append(function)

    def extend(self, functions: Iterable[Any]) -> None:
        for function in functions:
            self.append(function)


class _HostLeaf(LeafCore, comfy.ops.CastWeightBiasOp):
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, state: LayerState, geometry: Geometry, clock: Clock, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(state, geometry, clock)
        self._hold(quantized_tensor(state, dtype), bias)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """A plain attribute. Dynamic loading notes every buffer by its path and registers it there again later, on
        whatever module stands there by then: the float layer, or the leaf of another MODEL."""
        setattr(self, name, tensor)

    def _tables(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name, None) for name in TABLES}
        return {name: table for name, table in found.items() if table is not None}

    def _hold(self, weight: QuantizedTensor, bias: Tensor | None) -> None:
        """What the host finds and expects on a leaf."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.weight_function = []
        self.bias_function: list[Any] = []  # the host extends it in place, so it must not be the class's own
        # LoRA deltas that came after quantization; owned by `lora.reconcile`.
        self.residuals: tuple[Residual, ...] = ()
        # The merged float weight while a hooked LoRA is on.
        self.hooked: Tensor | None = None

    def forward(self, x: Tensor, norm: Norm | None = None, gated: bool = False) -> Tensor:
        """norm: a convolution's input is SiLU(norm(x)). gated: `geglu` follows the layer."""
        comfy.ops.run_every_op()
        self._bring_tables(x.device)
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self, input=None, dtype=self.weight.dtype, device=x.device, bias_dtype=x.dtype, offloadable=True,
            compute_dtype=x.dtype, want_requant=True,
        )  # fmt: skip
        together = (norm is not None or gated) and self._is_alone(weight)
        if norm is not None and not together:
            x, norm = F.silu(norm(x)), None
        if self.hooked is not None:
            y = self.float_forward(x, self.hooked.to(x.device, x.dtype), bias)
        elif together:
            y = self._in_integers(x, weight, bias, norm, gated)
        elif isinstance(weight, QuantizedTensor):
            y = self.integer_forward(x, weight, bias)
        else:  # another pack's weight function: the host hands over a float weight
            y = self.float_forward(x, weight.to(x.dtype), bias)
        for residual in self.residuals:
            y = y + self.residual_forward(x, residual)
        if gated and not together:
            y = geglu(y)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return y

    def _is_alone(self, weight: Tensor) -> bool:
        """Whether nobody but the integer kernel needs the float input or output."""
        integer = self.hooked is None and isinstance(weight, QuantizedTensor) and self.scheme.activation != NONE
        return integer and not self.residuals

    def _bring_tables(self, device: torch.device) -> None:
        """A leaf that is not loaded whole stays where it is, and the host streams parameters alone."""
        for name, table in self._tables().items():
            if table.device != device:
                self.__dict__[name] = table.to(device)  # not by attribute: it is the same table

    @property
    def weight_function(self) -> list[Any]:
        """What the host runs over the weight at every call; its own merge of a patch is not taken in."""
        return self._weight_function

    @weight_function.setter
    def weight_function(self, functions: list[Any]) -> None:
        self._weight_function = _WithoutPatches()
        self._weight_function.extend(functions)

    @property
    def weight_lowvram_function(self) -> None:
        """The same for dynamic loading."""
        return None

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, function: Any) -> None:
        pass

    def integer_forward(self, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        """weight: on x's device."""
        if self.scheme.activation == NONE:
            return self.float_forward(x, weight.dequantize().to(x.dtype), bias)
        return self._in_integers(x, weight, bias)

    def _in_integers(
        self, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, norm: Norm | None = None, gated: bool = False
    ) -> Tensor:
        codes = packed(weight._qdata, weight._params) if self.scheme.weight_bits == 4 else codes_of(weight._qdata)
        own = self.weight
        assert isinstance(own, QuantizedTensor)
        streamed = own._qdata is not weight._qdata
        # What dynamic loading keeps on the device it hands over as the same object at every call.
        resident = weight if weight is getattr(self, "_v_weight", None) else None
        return self.compute(x, own, codes, weight._params.scale, bias, norm, gated, streamed, resident)

    def _keep(self, codes: Tensor, same: Tensor) -> None:
        own = self.weight
        assert isinstance(own, QuantizedTensor)
        own._qdata = reordered(same)

    def float_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def residual_forward(self, x: Tensor, residual: Residual) -> Tensor:
        raise NotImplementedError

    def convert_weight(self, weight: Tensor, inplace: bool = False, **_: Any) -> Tensor:
        """Called by the host before it merges a patch."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(
        self,
        weight: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **_: Any,
    ) -> Tensor | None:
        """Called by the host with the merged float weight.

        Asked to return it (when saving) we round the merged weight on the old scale. During a load we keep the codes:
        `lora.reconcile`, which runs when the load is complete, adds the patch as a residual. What is left is a hooked
        LoRA that comes and goes between two calls: while it is on (`lora.unhook`), the layer computes in float.
        """
        if return_weight:
            own = self.weight
            assert isinstance(own, QuantizedTensor)
            return own.requantize_from_float(weight)
        if inplace_update:
            self.hooked = weight
        return None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Torch cannot detach a wrapper subclass in inference mode (where the host runs a graph) that was made outside
        # of it (where the host unloads a model on request); one that was made inside is good for both.
        if isinstance(param, QuantizedTensor) and not param.is_inference():
            with torch.inference_mode():
                param = nn.Parameter(param._copy_with(clone_params=False), requires_grad=False)
        super().register_parameter(name, param)

    def __deepcopy__(self, memo: dict[int, Any]) -> _HostLeaf:
        with torch.inference_mode():  # a QuantizedTensor does not know how to copy itself
            memo[id(self.weight)] = nn.Parameter(self.weight.clone(), requires_grad=False)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> _HostLeaf:
        # What was prepared on one device would stay there when the weight leaves.
        self._prepared = self._sums = None
        # nn.Module._apply swaps `param.data`, which a wrapper subclass does not take.
        for name, param in self._parameters.items():
            if param is not None:
                moved = fn(param)
                if moved.is_inference() and not torch.is_inference_mode_enabled():
                    moved = moved.clone()
                off_gpu = moved.device.type == "cpu" and isinstance(moved, QuantizedTensor)
                if off_gpu and not moved._qdata.is_contiguous():  # in its kernel's order; the host streams plain ones
                    moved._qdata = moved._qdata.contiguous()
                self.register_parameter(name, nn.Parameter(moved, requires_grad=False))
        for name, table in self._tables().items():
            moved = fn(table)
            # A cast of the model must not touch the tables: the kernels want them as they are.
            self.__dict__[name] = moved if moved.dtype == table.dtype else table.to(moved.device)
        self.residuals = tuple(r.to(self.weight.device) for r in self.residuals)
        return self


class QuantLinear(_HostLeaf):
    """Stands in for a Linear; same attributes, same keys."""

    def __init__(self, module: nn.Linear, state: LayerState, geometry: Geometry, clock: Clock, **own: Any) -> None:
        super().__init__(state, geometry, clock, **own)
        self.in_features = module.in_features
        self.out_features = module.out_features

    def integer_forward(self, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        if self.scheme.weight_format != INT:
            return nf4.linear(x, weight, bias)
        return super().integer_forward(x, weight, bias)

    def float_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def residual_forward(self, x: Tensor, residual: Residual) -> Tensor:
        return residual.linear(x)


class QuantConv2d(_HostLeaf):
    """Stands in for a Conv2d; same attributes, same keys."""

    def __init__(self, module: nn.Conv2d, state: LayerState, geometry: Geometry, clock: Clock, **own: Any) -> None:
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
    module: nn.Module, state: LayerState, geometry: Geometry, clock: Clock, bias: Tensor | None, dtype: torch.dtype
) -> QuantLinear | QuantConv2d:
    """The leaf for `module`. bias: float [N] or None; dtype: that of the float weight."""
    if isinstance(module, nn.Conv2d):
        return QuantConv2d(module, state, geometry, clock, bias=bias, dtype=dtype)
    assert isinstance(module, nn.Linear)
    return QuantLinear(module, state, geometry, clock, bias=bias, dtype=dtype)
