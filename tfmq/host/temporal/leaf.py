"""Layers of a Temporal Information Block as ComfyUI's patcher wants them.

They hold packed integer weights with an activation grid per timestep of the finite set, rows of a cache, or both.

Which timestep it is they read from a clock with one interval around every point of the finite set: a device tensor that
is written once per call of the network.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams
from torch import Tensor
from torch.nn import functional as F

from ...files import PAIRS
from ...geometry import Geometry
from ...kernels import reference
from ...kernels.int8_product import MIN_ROWS, MULTIPLE, int8_product
from ...kernels.table import LINEAR_STATIC, pick
from ...runtime.fused import PLAIN, Fused
from ...runtime.tables import Tables
from ...temporal.fsc import quantize_activation, weight_codes, weight_grid
from ...temporal.packing import SHIFT, from_halves, pack, signed_zero_point, unpack
from ...timeline import Clock, Partition, TimeAxis
from ..leaf.base import HostLeaf
from ..leaf.residual import Residual

NAME = "TFMQTemporalLayout"
WEIGHT = "codes"  # the field that a file holds as `<path>.weight`
ABSENT = 1  # entries of a tensor that stands for none: the host streams all tensors of a layout


def absent(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(ABSENT, dtype=dtype)


@dataclass(frozen=True)
class TemporalState:
    """One layer as it is kept. Tensors that a kind of layer lacks hold one zero (`absent`).

    shape: of the float weight, (N, K). points: T of the finite set. bits: 8 or 4 of `codes`, 0 without weights.
    codes: packed [N, ...] (`tfmq.temporal.packing`); scale float32 [N]; zero_point int8 [N]; act_scale float32 and
    act_zero_point int32 [T].
    rows: cache, uint8 with row_scale and row_low float32 ([rows, 1] or [1, N]), or float16. Without weights [T, N], or
    absent for a layer that nobody reads any more; with weights only those of cached intervals, and then row_start
    int32 [I] is the number of the first row of each interval, or -1.
    """

    shape: tuple[int, int]
    points: int
    bits: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    act_scale: Tensor
    act_zero_point: Tensor
    rows: Tensor
    row_scale: Tensor
    row_low: Tensor
    row_start: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, without the absent ones."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v for name, v in found.items() if isinstance(v, Tensor) and v.numel() > ABSENT}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def temporal_state(shape: tuple[int, int], points: int, bits: int = 0, **tensors: Tensor) -> TemporalState:
    """A state of the given tensors, the others absent."""
    kinds = {"codes": torch.uint8, "zero_point": torch.int8, "act_zero_point": torch.int32, "row_start": torch.int32}
    names = [f.name for f in fields(TemporalState) if f.name not in ("shape", "points", "bits")]
    return TemporalState(shape, points, bits, **{n: tensors.get(n, absent(kinds.get(n, torch.float32))) for n in names})


class TemporalLayout(QuantizedLayout):
    """Packed codes [N, ...] with scale and zero point per output channel, and rows of a cache; where there are no codes
    the rows take their place. A layer without weights is told to the host as zeros: rows plus what a LoRA adds."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """As in `TemporalState`."""

        zero_point: Tensor
        rows: Tensor
        row_scale: Tensor
        row_low: Tensor
        row_start: Tensor
        bits: int

        def _tensor_fields(self) -> list[str]:
            return ["scale", "zero_point", "rows", "row_scale", "row_low", "row_start"]

    @classmethod
    def quantize(cls, tensor: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """Float weight [N, K] -> 8-bit codes. With `like` (the tensor that `tensor` came from by a patch) on its grid;
        one without weights stays as it is."""
        like: QuantizedTensor | None = options.get("like")
        if like is None:
            scale, zero = weight_grid(tensor, 8)
            shape = tensor.shape[0], tensor.shape[1]
            state = temporal_state(shape, 0, 8, scale=scale, zero_point=signed_zero_point(zero, 8))
            return pack(weight_codes(tensor, scale, zero, 8), 8), _params(state, tensor.dtype)
        p = like._params
        if not p.bits:
            return like._qdata, p
        zero = p.zero_point.int() + (SHIFT if p.bits == 8 else 0)
        return pack(weight_codes(tensor, p.scale, zero, p.bits), p.bits), p

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        if not params.bits:
            return torch.zeros(params.orig_shape, dtype=params.orig_dtype, device=qdata.device)
        codes = unpack(qdata, params.bits, params.orig_shape[1]).float()
        return codes.sub_(params.zero_point.unsqueeze(1)).mul_(params.scale.unsqueeze(1)).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        p = qtensor._params
        return qtensor._qdata, p.scale, p.zero_point

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        return {"": qdata} | {f"_{name}": getattr(params, name) for name in params._tensor_fields()}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        return {"like": qtensor}


register_layout_class(NAME, TemporalLayout)


def _params(state: TemporalState, dtype: torch.dtype) -> TemporalLayout.Params:
    return TemporalLayout.Params(
        scale=state.scale, orig_dtype=dtype, orig_shape=state.shape, zero_point=state.zero_point,
        rows=state.rows if state.bits else absent(), row_scale=state.row_scale, row_low=state.row_low,
        row_start=state.row_start, bits=state.bits,
    )  # fmt: skip


def finite_set_clock(axis: TimeAxis, points: int) -> Clock:
    """A clock whose interval is the number of the nearest point of `FiniteSet.of(axis, points)`."""
    return Clock(axis, Partition(tuple((i + 0.5) / (points - 1) for i in range(points - 1))))


class TemporalLinear(HostLeaf):
    """Stands in for a Linear of the temporal path. clock: of `finite_set_clock`; dtype: of the float weight."""

    def __init__(self, state: TemporalState, clock: Clock, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.geometry = Geometry(state.shape)
        self.out_features, self.in_features = state.shape
        self.points = state.points
        self.clock = clock
        self.tables = Tables(state.act_scale, state.act_zero_point)
        # A row is the whole feature, bias included.
        qdata = state.codes if state.bits else state.rows
        self.hold_weight(QuantizedTensor(qdata, NAME, _params(state, dtype)), bias if state.bits else None)

    @property
    def state(self) -> TemporalState:
        """What the leaf holds, on its device."""
        weight = self.weight
        assert isinstance(weight, QuantizedTensor)
        p, device = weight._params, weight.device
        act_scale, act_zero_point = self.tables.grid(0)
        return TemporalState(
            tuple(p.orig_shape), self.points, p.bits, weight._qdata if p.bits else absent(torch.uint8), p.scale,
            p.zero_point, act_scale.to(device), act_zero_point.to(device),
            p.rows if p.bits else weight._qdata, p.row_scale, p.row_low, p.row_start,
        )  # fmt: skip

    def integer_forward(self, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, fused: Fused = PLAIN) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype. fused: nothing is, with such a layer."""
        p, flat = weight._params, x.reshape(-1, x.shape[-1])
        y = self._product(flat, weight._qdata, p, bias) if p.bits else x.new_zeros(flat.shape[0], p.orig_shape[0])
        return self._with_rows(y, weight).to(x.dtype).reshape(*x.shape[:-1], -1)

    def float_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer as it is, plus what `weight` has over it: a cached row has no weight that could be replaced."""
        own = self.weight.detach().to(x.device)
        assert isinstance(own, QuantizedTensor)
        change = weight.float() - own.dequantize().float()
        return self.integer_forward(x, own, bias) + F.linear(x, change.to(x.dtype))

    def residual_forward(self, x: Tensor, residual: Residual) -> Tensor:
        return residual.linear(x)

    def _product(self, x: Tensor, packed: Tensor, p: Any, bias: Tensor | None) -> Tensor:
        """x [M, K] -> float32 [M, N]. sum (q - z) (c - v) = sum q c - z sum c - v sum q + K z v, all in integers."""
        now = self.clock.index(x.device)
        scale, zero = (grid.to(x.device).index_select(0, now) for grid in self.tables.grid(0))
        q = (quantize_activation(x, scale.unsqueeze(1), zero.unsqueeze(1)) - SHIFT).to(torch.int8)
        codes = unpack(packed, p.bits, x.shape[1])
        acc, sums = _integer_product(q, codes)
        z, v = zero - SHIFT, p.zero_point.int()
        acc = acc - z * sums - q.sum(1, dtype=torch.int32).unsqueeze(1) * v + x.shape[1] * z * v
        y = acc.float() * (scale * p.scale)
        return y if bias is None else y + bias.float()

    def _with_rows(self, y: Tensor, weight: QuantizedTensor) -> Tensor:
        """y [M, N], its rows replaced by the cached one where there is one for this timestep."""
        p = weight._params
        table = p.rows if p.bits else weight._qdata
        if table.numel() <= ABSENT:
            return y
        now = self.clock.index(table.device)
        row, on = now, None
        if p.bits:
            intervals = p.row_start.numel()
            interval = now * intervals // self.points
            start = p.row_start.index_select(0, interval).long()
            on = start >= 0
            row = (start + now - -(-interval * self.points // intervals)).clamp_(0, table.shape[0] - 1)
        feature = table.index_select(0, row).float()
        if table.dtype == torch.uint8:
            grid = [g.index_select(0, row) if g.shape[0] > 1 else g for g in (p.row_scale, p.row_low)]
            feature = feature * grid[0] + grid[1]
        feature = feature.to(y.device).expand(y.shape[0], -1)
        return feature if on is None else torch.where(on.to(y.device), feature, y.float())


def _integer_product(q: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """q int8 [M, K], codes int8 [N, K] -> their product int32 [M, N], and the sum of each row of codes, int32 [N]."""
    geometry = Geometry((codes.shape[0], codes.shape[1]))
    rows_in = q.shape[0]
    q = F.pad(q, (0, 0, 0, 1), value=1)  # a row of ones gives the sums
    if pick(LINEAR_STATIC, q.device, geometry).module is reference:
        acc = reference.integer_matmul(q, codes)
    else:
        rows, columns = -codes.shape[0] % MULTIPLE, -codes.shape[1] % MULTIPLE
        padded = F.pad(codes, (0, columns, 0, rows)) if rows or columns else codes.contiguous()
        q = F.pad(q, (0, columns, 0, max(0, MIN_ROWS - q.shape[0])))
        acc = int8_product(q, padded)[:, : codes.shape[0]]
    return acc[:rows_in], acc[rows_in]


def to_file(path: str, leaf: TemporalLinear) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Entry of the manifest and tensors of a leaf at `path`, as `from_file` reads them."""
    state = leaf.state
    tensors = {f"{path}.tfmq_{name}": v for name, v in state.tensors.items() if name != WEIGHT}
    if state.bits:
        tensors[f"{path}.weight"] = state.codes
    return {"shape": list(state.shape), "points": state.points, "bits": state.bits}, tensors


def from_file(path: str, about: dict[str, Any], tensors: dict[str, Tensor], version: int) -> TemporalState:
    """Takes the tensors of a leaf out of those of a file. Raises KeyError, TypeError or ValueError if it is damaged."""
    bits, points, (rows, columns) = int(about["bits"]), int(about["points"]), about["shape"]
    names = [f.name for f in fields(TemporalState) if f.name not in ("shape", "points", "bits", WEIGHT)]
    found = {name: tensors.pop(f"{path}.tfmq_{name}") for name in names if f"{path}.tfmq_{name}" in tensors}
    if bits:
        codes = tensors.pop(f"{path}.weight")
        found[WEIGHT] = from_halves(codes) if bits == 4 and version < PAIRS else codes
        needed = {"scale": rows, "zero_point": rows, "act_scale": points, "act_zero_point": points}
        if any(found[name].numel() != size for name, size in needed.items()):
            raise ValueError(f"layer {path} has tensors of another size")
    return temporal_state((int(rows), int(columns)), points, bits, **found)
