"""The modules that take the place of a Linear or Conv2d: integer codes in, integer kernel, float out.

`LeafCore` computes; how the weight is stored is left to the subclass, because the host streams and patches weights in
its own way. `QuantLinear` and `QuantConv2d` here hold plain tensors and need torch alone.
"""

from __future__ import annotations

import hashlib
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..formats.affine import dequantize_weight, per_channel
from ..formats.hadamard import constant, rotate, rotate_as_means, scaled, suits_tensor_cores, unrotate
from ..formats.int4 import Grid, Packed
from ..geometry import Codes, Geometry, Norm, StaticInput, code_sums, geglu
from ..kernels.table import (
    CONV2D_STATIC,
    CONV2D_STATIC_NORMED,
    LINEAR_DYNAMIC,
    LINEAR_STATIC,
    MULTIPLY_GATED,
    Backend,
    pick,
)  # fmt: skip
from ..kernels.triton.tune import capturing
from ..scheme import NONE
from ..state import LayerState
from ..timeline import Clock
from .branches import split
from .grids import Row
from .packed_codes import PackedCodes, plain
from .shared_input import Reading

TABLES = "act_scale", "act_zero_point", "inverse_balance", "permutations"


class LeafCore(nn.Module):
    """Activation table, clock and kernel choice of one quantized layer.

    Buffers (not saved under the module's keys): `act_scale` float32 and `act_zero_point` int32 of a static activation,
    [I], or [2, I] with the branches of CFG apart; `inverse_balance` float32 [K]; `permutations` integers [1, K] or
    [2, K] of the rotation.
    """

    act_scale: Tensor | None
    act_zero_point: Tensor | None
    inverse_balance: Tensor | None
    permutations: Tensor | None

    def __init__(self, state: LayerState, geometry: Geometry, clock: Clock) -> None:
        super().__init__()
        self.geometry = geometry
        self.scheme = state.scheme
        self.clock = clock
        self.operation = CONV2D_STATIC if geometry.is_conv else LINEAR_STATIC
        if state.act_scale is None:
            self.operation = LINEAR_DYNAMIC
        inverse = None if state.balance is None else state.balance.reciprocal()
        tables = state.act_scale, state.act_zero_point, inverse, state.permutations
        for name, value in zip(TABLES, tables, strict=True):
            self.register_buffer(name, value, persistent=False)
        self._prepared: tuple[Any, Backend, Any] | None = None
        self._sums: tuple[Any, Tensor] | None = None
        self._rows: dict[int, Row] = {}  # by branch, on the device where the leaf ran last
        self.reading = self._how_it_reads()
        self.readers = 1

    def _how_it_reads(self) -> Reading | None:
        """As `shared_input.Reader.reading`."""
        if self.geometry.is_conv or self.scheme.activation == NONE or self.scheme.branches > 1:
            return None
        tables = [getattr(self, name) for name in TABLES]
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.operation, self.scheme.activation_bits, self.scheme.rotation)).encode())
        for table in tables:
            digest.update(b"none" if table is None else f"{table.dtype} {tuple(table.shape)}".encode())
            if table is not None:
                digest.update(table.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return Reading(digest.digest(), any(table is not None for table in tables))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in TABLES:
            self.reading = None  # no longer those that it was made of
        super().__setattr__(name, value)

    def compute(
        self,
        x: Tensor,
        owner: object,
        codes: Tensor | Packed,
        scale: Tensor,
        bias: Tensor | None,
        norm: Norm | None = None,
        gated: bool = False,
        streamed: bool = False,
        resident: object | None = None,
    ) -> Tensor:
        """Run the layer on integer codes, int8 [N, K, ...] or packed.

        owner: what `codes` belong to; while it is the same object, the prepared form of the weight is reused.
        norm: the input is SiLU(norm(x)). gated: the result is `geglu` of the layer's. streamed: the codes are a copy of
        the owner's, and no memory is held for them but that of their sums. resident: such a copy that the host keeps
        where it is; while it is the same object, the prepared form is reused if it lies in the copy's own memory.
        """
        if x.numel() == 0:
            return geglu(self._empty(x)) if gated else self._empty(x)
        if gated and not self._gates(x.device, streamed):
            return geglu(self.compute(x, owner, codes, scale, bias, norm, streamed=streamed, resident=resident))
        prepared = self._prepare(x.device, owner, codes, scale, streamed, resident)
        module, weight = prepared[1].module, prepared[2]
        if gated:
            if not torch.compiler.is_compiling():
                self.clock.at(x.device).last_input.drop()
            return getattr(module, MULTIPLY_GATED)(self._quantize(x, weight, module), weight, bias).to(x.dtype)
        if not torch.compiler.is_compiling():  # a graph would hold on to what is here for a moment
            last_input = self.clock.at(x.device).last_input
            made = last_input.codes(self, x, module, lambda: self._quantize(x, weight, module))
            if made is not None:
                return module.multiply(made, weight, bias).to(x.dtype)
        rows, inverse = self._rotated(x, module)
        run = getattr(module, self.operation)
        if norm is not None and self._takes_norm(module):
            run = partial(getattr(module, CONV2D_STATIC_NORMED), norm=norm)
        elif norm is not None:
            rows = F.silu(norm(x))
        return self._run(rows, weight, inverse, bias, run).to(x.dtype)

    def _takes_norm(self, module: ModuleType) -> bool:
        # A grid of fewer bits has its input clipped, which would be too early.
        static = self.operation == CONV2D_STATIC and self.scheme.activation_bits == 8
        return static and hasattr(module, CONV2D_STATIC_NORMED)

    def _gates(self, device: torch.device, streamed: bool) -> bool:
        # What is unpacked or copied at every call would be put in another order at every call.
        if self.operation != LINEAR_STATIC or self.scheme.branches > 1 or self.scheme.weight_bits != 8 or streamed:
            return False
        return hasattr(pick(self.operation, device, self.geometry).module, MULTIPLY_GATED)

    def _rotated(self, x: Tensor, module: ModuleType) -> tuple[Tensor, Tensor | None]:
        """What is quantized of x, and what it still has to be multiplied by."""
        if not self.scheme.rotation:
            return x, self.inverse_balance
        if suits_tensor_cores(x):
            rows = x if self.inverse_balance is None else scaled(x, self.inverse_balance)
            rows, factor = rotate_as_means(rows, self.scheme.rotation, self.permutations)
            return rows, constant(factor, x.shape[-1], x.device)
        rows = x if self.inverse_balance is None else x.float() * self.inverse_balance
        # A CPU multiplies bfloat16 several times as fast, and the input has no more digits than that anyway. A product
        # in float takes the type of what it is given, and is slow in float32.
        own = hasattr(module, "IN_FLOAT") or (x.device.type == "cpu" and x.dtype == torch.bfloat16)
        narrow = x.dtype if own else torch.float32
        return rotate(rows.to(narrow), self.scheme.rotation, self.permutations), None

    def _quantize(self, x: Tensor, weight: Any, module: ModuleType) -> Codes:
        """The first half of a Linear."""
        rows, inverse = self._rotated(x, module)
        if self.act_scale is None:
            return module.quantize_dynamic(rows, weight, inverse, self.scheme.activation_bits)
        grid = self._grid_now(x.device, 0, self.act_scale, inverse)
        return module.quantize_static(self._clipped(rows, grid), weight, grid)

    def _run(self, x: Tensor, weight: Any, inverse_balance: Tensor | None, bias: Tensor | None, run: Any) -> Tensor:
        """inverse_balance: what x still has to be multiplied by."""
        if self.act_scale is None:
            return run(x, weight, inverse_balance, bias, self.scheme.activation_bits)
        if self.act_scale.dim() == 1:
            grid = self._grid_now(x.device, 0, self.act_scale, inverse_balance)
            return run(self._clipped(x, grid), weight, grid, bias)
        pieces = []
        for branch, rows in split(x, self.clock.at(x.device).branches):
            grid = self._grid_now(x.device, branch, self.act_scale, inverse_balance)
            pieces.append(run(self._clipped(rows, grid), weight, grid, bias))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _prepare(
        self, device: torch.device, owner: object, codes: Tensor | Packed, scale: Tensor, streamed: bool,
        resident: object | None,
    ) -> tuple[Any, Backend, Any]:  # fmt: skip
        prepared, of = self._prepared, resident if streamed else owner
        if prepared is not None and of is not None and prepared[0] is of:
            return prepared
        if isinstance(codes, PackedCodes):  # the weight is another object than before, its codes are the same
            prepared = self._prepared = (owner, codes.owner, codes.ready)
            return prepared
        backend = pick(self.operation, device, self.geometry)
        module = backend.module
        if isinstance(codes, Packed) and not hasattr(module, "prepare_packed"):
            # Unpacked anew at every call: kept, it would take the memory that 4 bits are there to save.
            unpacked = codes.int8()
            return owner, backend, module.prepare(unpacked, scale, self.geometry, self._sums_of(owner, unpacked))
        if streamed:
            sums = self._sums_of(owner, codes)
            if isinstance(codes, Packed):
                made = of, backend, module.prepare_packed(codes, self.geometry, sums)
            else:
                made = of, backend, module.prepare(codes, scale, self.geometry, sums)
            if of is not None and _in_place(made[2], codes):
                self._prepared = made
            return made
        if isinstance(codes, Packed):
            ready = module.prepare_packed(codes, self.geometry)
        else:
            ready = module.prepare(codes, scale, self.geometry)
        self._prepared = owner, backend, ready
        if not isinstance(codes, Packed):
            # The weight need not lie in memory twice.
            if hasattr(module, "restore"):
                self._keep(codes, PackedCodes(codes, backend, ready, module.restore))
            elif hasattr(module, "view"):
                self._keep(codes, module.view(ready))
        return self._prepared

    def _sums_of(self, owner: object, codes: Tensor | Packed) -> Tensor:
        """int32 [N], computed once per owner: to read a streamed weight only for them would take as long as to run
        the layer on a few rows."""
        kept = self._sums
        if kept is None or kept[0] is not owner or kept[1].device != codes.device:
            self._sums = kept = owner, code_sums(codes.int8() if isinstance(codes, Packed) else codes)
        return kept[1]

    def _keep(self, codes: Tensor, same: Tensor) -> None:
        """Let go of `codes` for `same`, which has the same entries in the memory of the prepared form."""

    def _grid_now(
        self, device: torch.device, branch: int, scale: Tensor, inverse_balance: Tensor | None
    ) -> StaticInput:
        """scale: `act_scale`. branch: which row of the tables, where the branches of CFG are apart."""
        moment, zero_point = self.clock.at(device), self._zero_points()
        if not torch.compiler.is_compiling():
            row = self._rows.get(branch)
            if row is None or not row.is_of(moment.grids, scale, zero_point):
                row = None
                if not capturing():  # a graph would hold on to the tables that are written into their place now
                    row = self._rows[branch] = moment.grids.row(self, branch, scale, zero_point)
            if row is not None:
                return StaticInput(row.scale, row.zero_point, inverse_balance)
        if scale.dim() == 2:
            scale, zero_point = scale[branch], zero_point[branch]
        now = moment.index
        return StaticInput(scale.index_select(0, now), zero_point.index_select(0, now), inverse_balance)

    def _clipped(self, x: Tensor, grid: StaticInput) -> Tensor:
        """The kernels clip to 8-bit codes; a narrower grid is kept by clipping its input."""
        bits = self.scheme.activation_bits
        if bits == 8:
            return x
        low, high = -grid.zero_point * grid.scale, (2**bits - 1 - grid.zero_point) * grid.scale
        if grid.inverse_balance is not None:
            balance = per_channel(grid.inverse_balance.reciprocal(), x.dim(), 1 if self.geometry.is_conv else -1)
            low, high = low * balance, high * balance
        return torch.minimum(torch.maximum(x, low.to(x.dtype)), high.to(x.dtype))

    def _zero_points(self) -> Tensor:
        assert self.act_zero_point is not None
        return self.act_zero_point

    def _empty(self, x: Tensor) -> Tensor:
        if not self.geometry.is_conv:
            return x.new_empty(*x.shape[:-1], self.geometry.shape[0])
        return x.new_empty(x.shape[0], self.geometry.shape[0], *self.geometry.output_size(x.shape[2], x.shape[3]))

    def __getstate__(self) -> dict[str, Any]:
        # A packed weight can be neither copied nor pickled, and a copy has rows of its own.
        return {**self.__dict__, "_prepared": None, "_sums": None, "_rows": {}}


def _in_place(ready: Any, codes: Tensor | Packed) -> bool:
    """Whether a prepared weight lies in the memory of the codes that it was made of."""
    given = codes.codes if isinstance(codes, Packed) else codes
    kept = getattr(ready, "codes", None)
    return isinstance(kept, Tensor) and kept.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


class _PlainLeaf(LeafCore):
    codes: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, state: LayerState, geometry: Geometry, clock: Clock, bias: Tensor | None = None) -> None:
        super().__init__(state, geometry, clock)
        self.register_buffer("codes", state.codes)
        self.register_buffer("weight_scale", state.scale)
        self.register_buffer("factor", state.factor)
        self.register_buffer("zero", state.zero)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, norm: Norm | None = None, gated: bool = False) -> Tensor:
        """norm: a convolution's input is SiLU(norm(x)). gated: `geglu` follows the layer."""
        if self.scheme.activation == NONE:
            y = self._float(x if norm is None else F.silu(norm(x)), self.dequantize().to(x.dtype))
            return geglu(y) if gated else y
        return self.compute(x, self.codes, self._packed() or self.codes, self.weight_scale, self.bias, norm, gated)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.codes, self._prepared, self._sums = plain(self.codes), None, None  # they are about to be written to
        super()._load_from_state_dict(*args)

    def _keep(self, codes: Tensor, same: Tensor) -> None:
        assert self._prepared is not None
        self.codes = same
        self._prepared = (same, *self._prepared[1:])

    def dequantize(self) -> Tensor:
        """The float weight that the codes stand for, float32 [N, K, ...]."""
        packed = self._packed()
        if packed is None:
            weight = dequantize_weight(self.codes, self.weight_scale)
        else:
            weight = packed.dequantize()
        weight = unrotate(weight, self.scheme.rotation, self.permutations)
        inverse = self.inverse_balance
        return weight if inverse is None else weight * per_channel(inverse, weight.dim(), 1)

    def _packed(self) -> Packed | None:
        factor, zero = self.factor, self.zero
        if not isinstance(factor, Tensor) or not isinstance(zero, Tensor):
            return None
        return Packed(self.codes, Grid(self.weight_scale, factor, zero, self.scheme.group), self.geometry.shape)

    def _float(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError


class QuantLinear(_PlainLeaf):
    """x [..., K] -> [..., N]."""

    def _float(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class QuantConv2d(_PlainLeaf):
    """x [B, C, H, W] -> [B, N, H', W']."""

    def _float(self, x: Tensor, weight: Tensor) -> Tensor:
        g = self.geometry
        return F.conv2d(x, weight, self.bias, g.stride, g.padding, g.dilation, g.groups)
