"""The modules that take the place of a Linear or Conv2d: integer codes in, integer kernel, float out.

`LeafCore` computes; how the weight is stored is left to the subclass, because the host streams and patches weights in
its own way. `QuantLinear` and `QuantConv2d` here hold plain tensors and need torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..formats.affine import dequantize_weight, per_channel
from ..formats.hadamard import constant, rotate, rotate_as_means, scaled, suits_tensor_cores, unrotate
from ..formats.int4 import Grid, Packed
from ..geometry import Geometry, StaticInput, code_sums
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
from .branches import split
from .fused import PLAIN, Fused
from .grids import Row
from .packed_codes import PackedCodes, plain
from .run_state import Here, RunState
from .shared_input import Reading
from .tables import Tables

QUANTIZE = {LINEAR_STATIC: "quantize_static", LINEAR_DYNAMIC: "quantize_dynamic"}


class LeafCore(nn.Module):
    """Tables, run state and kernel choice of one quantized layer. `hold` gives it other tables."""

    tables: Tables
    reading: Reading | None
    # Of `tables`.
    act_scale = property(lambda self: self.tables.act_scale)
    act_zero_point = property(lambda self: self.tables.act_zero_point)
    inverse_balance = property(lambda self: self.tables.inverse_balance)
    permutations = property(lambda self: self.tables.permutations)

    def __init__(self, state: LayerState, geometry: Geometry, clock: RunState) -> None:
        super().__init__()
        self.geometry = geometry
        self.scheme = state.scheme
        self.clock = clock
        self.operation = CONV2D_STATIC if geometry.is_conv else LINEAR_STATIC
        if state.act_scale is None:
            self.operation = LINEAR_DYNAMIC
        self._prepared: tuple[Any, Backend, Any] | None = None
        self._sums: tuple[Any, Tensor] | None = None
        self._rows: dict[int, Row] = {}  # by branch, on the device where the leaf ran last
        self.hold(Tables.of(state))
        self.readers = 1

    def hold(self, tables: Tables) -> None:
        """Compute with these from now on."""
        self.tables, self.reading = tables, None  # `reading`: as in `shared_input.Reader`
        if not (self.geometry.is_conv or self.scheme.activation == NONE or self.scheme.branches > 1):
            digest = tables.digest(self.operation, self.scheme.activation_bits, self.scheme.rotation)
            self.reading = Reading(digest, tables.device is not None)

    def compute(self, x: Tensor, key: object, weight: Any, bias: Tensor | None, fused: Fused = PLAIN) -> Tensor:
        """Run the layer on integer codes.

        weight: on the device of x, as `_stored` reads it. key: while it is the same object, the prepared form of the
        weight is reused. It is `_owner()`, or a copy that the host keeps where it is, of which only what lies in its
        own memory is kept; None: the weight is a copy for this call, of which nothing is kept.
        """
        if x.numel() == 0:
            return fused.after(self._empty(x))
        norm, gated = fused
        if gated and not self._gates(x.device, key):
            return fused.after(self.compute(x, key, weight, bias, Fused(norm)))
        prepared = self._prepared
        if prepared is None or prepared[0] is not key:
            prepared = self._prepare(x.device, key, weight)
        module, ready = prepared[1].module, prepared[2]
        if norm is not None and not self._takes_norm(module):
            x, norm = fused.before(x), None
        # A graph would hold on to what is here for a moment.
        here = None if torch.compiler.is_compiling() else self.clock.at(x.device)
        shared = None if here is None else here.shared_input
        if shared is not None and gated:
            shared.drop()
            shared = None
        elif shared is not None and not shared.read(self, x, module):
            shared = None
        codes = None if shared is None else shared.codes
        if codes is None:
            scheme, tables = self.scheme, self.tables
            more: tuple[int, ...] = ()
            rows = x
            about: Any = tables.inverse_balance  # or of what is rotated; then the grid, where that is static
            if scheme.rotation:
                rows, about = self._rotated(x, module)
            if tables.act_scale is None:
                more = (scheme.activation_bits,)
            elif not tables.apart:
                about = self._grid(x.device, 0, about, here)
                if scheme.activation_bits != 8:
                    rows = self._clipped(rows, about)
            if shared is None and not gated:
                run = getattr(module, self.operation)
                if norm is not None:
                    run = partial(getattr(module, CONV2D_STATIC_NORMED), norm=norm)
                if tables.apart:
                    y = self._by_branch(rows, ready, about, bias, run, here)
                else:
                    y = run(rows, ready, about, bias, *more)
                return y if y.dtype is x.dtype else y.to(x.dtype)
            codes = getattr(module, QUANTIZE[self.operation])(rows, ready, about, *more)
        if shared is not None:
            shared.keep(codes)
        y = module.multiply_gated(codes, ready, bias) if gated else module.multiply(codes, ready, bias)
        return y if y.dtype is x.dtype else y.to(x.dtype)

    def _owner(self) -> object:
        """What the codes belong to, wherever copies of them are."""
        raise NotImplementedError

    def _stored(self, weight: Any) -> tuple[Tensor | Packed, Tensor]:
        """The codes of a weight, int8 [N, K, ...] or packed, and its scales."""
        raise NotImplementedError

    def _keep(self, same: Tensor) -> None:
        """Let go of the codes for `same`, which has the same entries in the memory of the prepared form."""

    def _takes_norm(self, module: ModuleType) -> bool:
        # A grid of fewer bits has its input clipped, which would be too early.
        static = self.operation == CONV2D_STATIC and self.scheme.activation_bits == 8
        return static and hasattr(module, CONV2D_STATIC_NORMED)

    def _gates(self, device: torch.device, key: object) -> bool:
        if self.operation != LINEAR_STATIC or self.scheme.branches > 1 or self.scheme.weight_bits != 8:
            return False
        # What is unpacked or copied at every call would be put in another order at every call.
        return key is self._owner() and hasattr(pick(self.operation, device, self.geometry).module, MULTIPLY_GATED)

    def _rotated(self, x: Tensor, module: ModuleType) -> tuple[Tensor, Tensor | None]:
        """What is quantized of x, and what it still has to be multiplied by."""
        inverse, permutations = self.tables.inverse_balance, self.tables.permutations
        if suits_tensor_cores(x):
            rows = x if inverse is None else scaled(x, inverse)
            rows, factor = rotate_as_means(rows, self.scheme.rotation, permutations)
            return rows, constant(factor, x.shape[-1], x.device)
        rows = x if inverse is None else x.float() * inverse
        # A CPU multiplies bfloat16 several times as fast, and the input has no more digits than that anyway. A product
        # in float takes the type of what it is given, and is slow in float32.
        own = hasattr(module, "IN_FLOAT") or (x.device.type == "cpu" and x.dtype == torch.bfloat16)
        return rotate(rows.to(x.dtype if own else torch.float32), self.scheme.rotation, permutations), None

    def _by_branch(
        self, x: Tensor, ready: Any, inverse: Tensor | None, bias: Tensor | None, run: Callable[..., Tensor],
        here: Here | None,
    ) -> Tensor:  # fmt: skip
        """run(x), each branch of CFG on its own grid. inverse: what x still has to be multiplied by."""
        pieces = []
        for branch, rows in split(x, self.clock.at(x.device).branches):
            grid = self._grid(x.device, branch, inverse, here)
            pieces.append(run(self._clipped(rows, grid), ready, grid, bias))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _prepare(self, device: torch.device, key: object, weight: Any) -> tuple[Any, Backend, Any]:
        """As `compute`; kept in `_prepared` where that takes no memory beside the weight's."""
        (codes, scale), owner = self._stored(weight), self._owner()
        if isinstance(codes, PackedCodes):  # the weight is another object than before, its codes are the same
            prepared = self._prepared = (owner, codes.owner, codes.ready)
            return prepared
        backend = pick(self.operation, device, self.geometry)
        module = backend.module
        if isinstance(codes, Packed) and not hasattr(module, "prepare_packed"):
            # Unpacked anew at every call: kept, it would take the memory that 4 bits are there to save.
            unpacked = codes.int8()
            return owner, backend, module.prepare(unpacked, scale, self.geometry, self._sums_of(owner, unpacked))
        more = () if key is owner else (self._sums_of(owner, codes),)
        if isinstance(codes, Packed):
            ready = module.prepare_packed(codes, self.geometry, *more)
        else:
            ready = module.prepare(codes, scale, self.geometry, *more)
        made = key, backend, ready
        if key is owner or (key is not None and _in_place(ready, codes)):
            self._prepared = made
        if key is owner and not isinstance(codes, Packed):
            # The weight need not lie in memory twice.
            if hasattr(module, "restore"):
                self._keep(PackedCodes(codes, backend, ready, module.restore))
            elif hasattr(module, "view"):
                self._keep(module.view(ready))
        return made

    def _sums_of(self, owner: object, codes: Tensor | Packed) -> Tensor:
        """int32 [N], computed once per owner: to read a streamed weight only for them would take as long as to run
        the layer on a few rows."""
        kept = self._sums
        if kept is None or kept[0] is not owner or kept[1].device != codes.device:
            self._sums = kept = owner, code_sums(codes.int8() if isinstance(codes, Packed) else codes)
        return kept[1]

    def _grid(self, device: torch.device, branch: int, inverse: Tensor | None, here: Here | None) -> StaticInput:
        """inverse: what x still has to be multiplied by. branch: of CFG. here: None while a graph is compiled."""
        tables = self.tables
        if here is not None:
            row = self._rows.get(branch)
            if row is None or row.tables is not tables or row.at is not here.grids:
                row = None
                if not capturing():  # a graph would hold on to the tables that are written into their place now
                    row = self._rows[branch] = here.grids.row(self, branch, tables)
            if row is not None:
                grid = row.grid
                return grid if grid.inverse_balance is inverse else StaticInput(grid.scale, grid.zero_point, inverse)
        now = self.clock.index(device)
        scale, zero_point = tables.grid(branch)
        return StaticInput(scale.index_select(0, now), zero_point.index_select(0, now), inverse)

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

    def _empty(self, x: Tensor) -> Tensor:
        if not self.geometry.is_conv:
            return x.new_empty(*x.shape[:-1], self.geometry.shape[0])
        return x.new_empty(x.shape[0], self.geometry.shape[0], *self.geometry.output_size(x.shape[2], x.shape[3]))

    def _apply(self, fn: Any, recurse: bool = True) -> LeafCore:
        super()._apply(fn, recurse)
        self.tables = self.tables.moved(fn)
        return self

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

    def __init__(self, state: LayerState, geometry: Geometry, clock: RunState, bias: Tensor | None = None) -> None:
        super().__init__(state, geometry, clock)
        self.register_buffer("codes", state.codes)
        self.register_buffer("weight_scale", state.scale)
        self.register_buffer("factor", state.factor)
        self.register_buffer("zero", state.zero)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, fused: Fused = PLAIN) -> Tensor:
        """fused: what is to be computed with the layer."""
        if self.scheme.activation == NONE:
            return fused.after(self._float(fused.before(x), self.dequantize().to(x.dtype)))
        codes = self._buffers["codes"]
        return self.compute(x, codes, codes, self._buffers["bias"], fused)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.codes, self._prepared, self._sums = plain(self.codes), None, None  # they are about to be written to
        super()._load_from_state_dict(*args)

    def _owner(self) -> Tensor:
        return self.codes

    def _stored(self, codes: Tensor) -> tuple[Tensor | Packed, Tensor]:
        factor, zero, scale = self.factor, self.zero, self.weight_scale
        if not isinstance(factor, Tensor) or not isinstance(zero, Tensor):
            return codes, scale
        return Packed(codes, Grid(scale, factor, zero, self.scheme.group), self.geometry.shape), scale

    def _keep(self, same: Tensor) -> None:
        assert self._prepared is not None
        self.codes = same
        self._prepared = (same, *self._prepared[1:])

    def dequantize(self) -> Tensor:
        """The float weight that the codes stand for, float32 [N, K, ...]."""
        codes, scale = self._stored(self.codes)
        weight = codes.dequantize() if isinstance(codes, Packed) else dequantize_weight(codes, scale)
        weight = unrotate(weight, self.scheme.rotation, self.tables.permutations)
        inverse = self.tables.inverse_balance
        return weight if inverse is None else weight * per_channel(inverse, weight.dim(), 1)

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
