"""Learned rounding of all 4-bit layers of one unit together (AdaRound, 2004.10568, eq. 21 to 24; per block as in BRECQ,
2102.05426; for diffusion models Q-Diffusion, 2302.04304).

    w = step * (clamp(floor(place) + h(alpha), 0, 15) - zero),   h(alpha) = clip(1.2 sigmoid(alpha) - 0.1, 0, 1)

is fitted to the outputs of the float unit: squared error, summed over channels, mean over all else, plus
r sum(1 - |2 h - 1|^beta) with beta from 20 to 2 after a warm-up of a fifth. The paper's r is 0.01; here it is a
multiple of the start's loss over the number of weights, because losses differ by orders of magnitude between units.
Inputs come from the quantized part of the network before the unit, and activations inside are rounded, so that the
rounding of the weights makes up for both. It starts at the codes of error feedback.

The gradient of h and of the regulariser is written out: alpha has an entry per weight, and what autograd would keep of
it costs more than the unit itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..formats import int4
from ..formats.rectified import MARGIN, WIDTH, alpha_of
from . import tree
from .layer import Layer, Rows, grid_to

WARM_UP, BETA = 0.2, (20.0, 2.0)
START = 0.9  # h of an entry that error feedback rounded up; 1 - START of one that it rounded down
Call = Callable[[Any, Any, Rows, torch.dtype], list[Tensor]]


@dataclass(frozen=True)
class Group:
    """Samples of one unit whose tensors have one shape. args, kwargs: trees of its inputs; targets: its float outputs;
    rows: what they are."""

    args: Any
    kwargs: Any
    targets: list[Tensor]
    rows: Rows

    @property
    def count(self) -> int:
        return int(self.rows.interval.shape[0])

    def take(self, which: Tensor, device: torch.device) -> Group:
        """Some of the samples, int64 [b], on `device`; floating tensors in float32."""
        picked = tree.take((self.args, self.kwargs, self.targets), which, self.count)
        args, kwargs, targets = tree.map_tensors(picked, lambda t: _to(t, device))
        return Group(args, kwargs, targets, self.rows[which].to(device))


@dataclass(frozen=True)
class Settings:
    """iterations of AdaRound and of the scales' tuning after it, rows per step, learning rate of alpha, and what the
    regulariser can amount to, as a multiple of the loss at the start."""

    iterations: int
    scale_iterations: int
    batch: int
    rate: float
    regularizer: float = 1.0


@dataclass(frozen=True)
class Starting:
    """Where a layer's rounding starts: the real-valued place of each weight on its grid, float32 [N, K'], and the codes
    that were made of it."""

    place: Tensor
    codes: Tensor


class Draw:
    """Draws training samples evenly over the intervals and branches that there are."""

    def __init__(self, groups: Sequence[Group], seed: int) -> None:
        self.groups = groups
        self.generator = torch.Generator().manual_seed(seed)
        self.shares = torch.tensor([float(group.count) for group in groups])
        self.cells: list[list[Tensor]] = []
        for group in groups:
            cell = group.rows.interval.cpu() * 2 + group.rows.branch.cpu()
            self.cells.append([(cell == value).nonzero().flatten() for value in cell.unique()])

    def __call__(self, count: int) -> tuple[Group, Tensor]:
        """A group and rows of it, int64 [<= count], no row twice."""
        number = int(torch.multinomial(self.shares, 1, generator=self.generator))
        cells = self.cells[number]
        rows: list[int] = []
        count = min(count, self.groups[number].count)
        while len(rows) < count:
            for place in torch.randperm(len(cells), generator=self.generator)[: count - len(rows)].tolist():
                at = int(torch.randint(len(cells[place]), (1,), generator=self.generator))
                rows.append(int(cells[place][at]))
        return self.groups[number], torch.tensor(sorted(set(rows)))

    def take(self, count: int, device: torch.device) -> Group:
        """That many samples, on `device`."""
        group, rows = self(count)
        return group.take(rows, device)


def fit(call: Call, part: Group, dtype: torch.dtype, prepare: Callable[[], None]) -> None:
    """Backward of the loss of some samples. prepare: sets the layers' trained tensors, before every forward."""
    prepare()
    try:
        args, kwargs = tree.map_tensors((part.args, part.kwargs), Tensor.clone)  # a unit may write to its inputs
        loss(call(args, kwargs, part.rows, dtype), part.targets).backward()
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        # A unit that adds to its residual stream in place (Flux): what backward needs is copied first. Slower.
        prepare()
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            args, kwargs = tree.map_tensors((part.args, part.kwargs), Tensor.clone)
            loss(call(args, kwargs, part.rows, dtype), part.targets).backward()


def loss(found: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Sum over the outputs of the squared error, summed over channels, mean over all else."""
    total = torch.zeros((), device=targets[0].device)
    for y, target in zip(found, targets, strict=True):
        channels = y.shape[1] if y.dim() == 4 else y.shape[-1]
        total = total + (y.float() - target).square().mean() * channels
    return total


def measure(call: Call, groups: Sequence[Group], device: torch.device, batch: int) -> float:
    """`loss` over all samples of the groups, without gradients."""
    total, count = 0.0, 0
    with torch.no_grad():
        for group in groups:
            for rows in torch.arange(group.count).split(batch):
                part = group.take(rows, device)
                found = call(part.args, part.kwargs, part.rows, torch.float32)
                total += float(loss(found, part.targets)) * len(rows)
                count += len(rows)
    return total / max(count, 1)


def adaround(
    call: Call, layers: dict[str, Layer], start: dict[str, Starting], loss_there: float, groups: Sequence[Group],
    settings: Settings, device: torch.device, dtype: torch.dtype, seed: int, tell: Callable[[], None],
) -> dict[str, Tensor]:  # fmt: skip
    """Path -> codes uint8 [N, K'] after hard rounding. layers: with their grids set. tell: called after every step.

    loss_there: of the start. call: runs the unit on (args, kwargs, rows, dtype of the products). The layers are left
    without a trained weight.
    """
    soft = {path: _Soft(layers[path], start[path], device) for path in start}
    optimizer = torch.optim.Adam(
        [part.alpha for part in soft.values()], lr=settings.rate, fused=device.type in ("cpu", "cuda")
    )
    draw = Draw(groups, seed)
    regularizer = settings.regularizer * loss_there / sum(one.alpha.numel() for one in soft.values())

    def decode() -> None:
        for path, one in soft.items():
            layers[path].trained = one.weight()

    try:
        for step in range(settings.iterations):
            part = draw.take(settings.batch, device)
            with torch.enable_grad():
                fit(call, part, dtype, decode)
            share = (step / settings.iterations - WARM_UP) / (1 - WARM_UP)
            beta = BETA[0] + (BETA[1] - BETA[0]) * share if share > 0 else None
            for one in soft.values():
                one.gradient(regularizer, beta)
            optimizer.step()
            tell()
    finally:
        for path in soft:
            layers[path].trained = None
    return {path: one.codes() for path, one in soft.items()}


class _Soft:
    """The rounding of one layer as a real variable. All tensors in the layout of the weight, [N, K, ...]."""

    def __init__(self, layer: Layer, start: Starting, device: torch.device) -> None:
        assert layer.grid is not None
        shape, grid = layer.geometry.shape, grid_to(layer.grid, device)
        place, codes = start.place.to(device), start.codes.to(device)
        # Every entry can move to a neighbour: the last code has nothing above it.
        floor = torch.minimum(place.floor(), codes.float()).clamp_(0, int4.TOP - 1)
        zero = grid.zero.float().repeat_interleave(grid.group, 1)
        step = int4.step(grid)

        def laid_out(columns: Tensor) -> Tensor:
            return int4.from_columns(columns, shape).contiguous()

        self.floor = laid_out(floor)
        self.step = laid_out(step)
        self.base = laid_out((floor - zero) * step)
        h = torch.where(codes > floor, START, 1 - START)
        self.alpha = torch.nn.Parameter(alpha_of(laid_out(h)))
        self._h = torch.empty_like(self.alpha)
        self._slope = torch.empty_like(self.alpha)
        self._weight = torch.empty_like(self.alpha).requires_grad_()
        self._work = torch.empty_like(self.alpha)

    @torch.no_grad()
    def weight(self) -> Tensor:
        torch.sigmoid(self.alpha, out=self._work)
        torch.mul(self._work, WIDTH, out=self._h).sub_(MARGIN)
        # Slope of h: WIDTH s (1 - s) where it is not clipped.
        torch.mul(self._work, self._work, out=self._slope).neg_().add_(self._work).mul_(WIDTH)
        inside = self._h.clamp(0, 1)
        self._slope.mul_(inside == self._h)
        self._h = inside
        torch.addcmul(self.base, self.step, self._h, out=self._weight.detach())
        self._weight.grad = None
        return self._weight

    @torch.no_grad()
    def gradient(self, regularizer: float, beta: float | None) -> None:
        found = self._weight.grad
        # A layer that did not take part in this call has no gradient.
        total = torch.zeros_like(self.step) if found is None else found.mul_(self.step)
        if beta is not None:
            # d/dh of r (1 - |2 h - 1|^beta)
            away = torch.mul(self._h, 2, out=self._work).sub_(1)
            size = away.abs().clamp_min_(1e-12).log2_().mul_(beta - 1).exp2_()
            total.addcmul_(size, away.sign_(), value=-2 * beta * regularizer)
        self.alpha.grad = total.mul_(self._slope)

    def codes(self) -> Tensor:
        up = self.alpha.detach() >= 0  # h >= 1/2
        columns = int4.to_columns(self.floor + up)
        return columns.clamp_(0, int4.TOP).to(torch.uint8)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, torch.float32) if tensor.is_floating_point() else tensor.to(device)
