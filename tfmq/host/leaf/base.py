"""What ComfyUI's patcher wants of a layer in integers: no children, one weight, one bias, castable.

How a weight is streamed, patched and evicted is the host's business; what it asks of a leaf for that is in
docs/architecture.md.
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

from ...geometry import Geometry
from ...runtime.fused import PLAIN, Fused
from ...runtime.tables import Tables
from .residual import Residual

# Runtime state that the host hangs on a module; a copy that computes on its own must not share it.
HOST_STATE = (
    "_v", "_v_weight", "_v_bias", "_v_signature", "_prefetch", "_pins", "_pin_state", "comfy_patched_weights",
    "weight_lowvram_function", "bias_lowvram_function",
)  # fmt: skip


class _WithoutPatches(list):
    """Weight functions, less the merging of patches: a patch is in `residuals` already and would count twice."""

    def append(self, function: Any) -> None:
        if not isinstance(function, LowVramPatch):
            super().append(function)

    def extend(self, functions: Iterable[Any]) -> None:
        for function in functions:
            self.append(function)


class HostLeaf(nn.Module, comfy.ops.CastWeightBiasOp):
    """A layer whose weight is a QuantizedTensor. A subclass computes, and calls `hold_weight` when it is made."""

    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    tables: Tables

    def hold_weight(self, weight: QuantizedTensor, bias: Tensor | None) -> None:
        """What the host finds and expects on a leaf."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.weight_function = []
        self.bias_function: list[Any] = []  # the host extends it in place, so it must not be the class's own
        # LoRA deltas that came after quantization; owned by `lora.reconcile`.
        self.residuals: tuple[Residual, ...] = ()
        # The merged float weight while a hooked LoRA is on.
        self.hooked: Tensor | None = None

    def forward(self, x: Tensor, fused: Fused = PLAIN) -> Tensor:
        """fused: what is to be computed with the layer."""
        comfy.ops.run_every_op()
        own, tables = self.weight, self.tables
        if tables.device != x.device and tables.device is not None:
            self._bring_tables(x.device)
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self, input=None, dtype=own.dtype, device=x.device, bias_dtype=x.dtype, offloadable=True,
            compute_dtype=x.dtype, want_requant=True,
        )  # fmt: skip
        if self.hooked is None and not self.residuals and isinstance(weight, QuantizedTensor):
            y = self.integer_forward(x, weight, bias, fused)
        else:
            y = fused.after(self._with_patches(fused.before(x), weight, bias))
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return y

    def _with_patches(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer beside which something is computed in float, or in float itself."""
        if self.hooked is not None:
            y = self.float_forward(x, self.hooked.to(x.device, x.dtype), bias)
        elif isinstance(weight, QuantizedTensor):
            y = self.integer_forward(x, weight, bias)
        else:  # another pack's weight function: the host hands over a float weight
            y = self.float_forward(x, weight.to(x.dtype), bias)
        for residual in self.residuals:
            y = y + self.residual_forward(x, residual)
        return y

    def _bring_tables(self, device: torch.device) -> None:
        """A leaf that is not loaded whole stays where it is, and the host streams parameters alone."""
        self.tables = self.tables.moved(lambda table: table.to(device))

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

    def integer_forward(self, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, fused: Fused = PLAIN) -> Tensor:
        """The layer, and what is fused with it. weight: on x's device."""
        raise NotImplementedError

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

    def __deepcopy__(self, memo: dict[int, Any]) -> HostLeaf:
        with torch.inference_mode():  # a QuantizedTensor does not know how to copy itself
            memo[id(self.weight)] = nn.Parameter(self.weight.clone(), requires_grad=False)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state: Any = self.__reduce_ex__(2)[2]
        # A second one of these would free the memory of the first.
        twin.__setstate__(copy.deepcopy({k: v for k, v in state.items() if k not in HOST_STATE}, memo))
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> HostLeaf:
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
        self.tables = self.tables.moved(fn)
        self.residuals = tuple(r.to(self.weight.device) for r in self.residuals)
        return self
