"""The Triton operations as functions of tensors and numbers, and as custom operations that torch.compile keeps whole.

In eager mode the plain functions run: a custom operation costs more time on the host than a launch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from ...geometry import Geometry, Norm, StaticInput
from . import launch
from .launch import Prepared


def flat(weight: Prepared) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int]:
    """A prepared weight as arguments of the operations."""
    return weight[:6]


# `Optional`: the schema of a custom operation is read from these on every Python that we run on.
def linear_static(
    x: Tensor, codes: Tensor, scale: Tensor, sums: Tensor, factor: Optional[Tensor], zero: Optional[Tensor],  # noqa: UP045
    group: int, act_scale: Tensor, act_zero: Tensor, inverse_balance: Optional[Tensor], bias: Optional[Tensor],  # noqa: UP045
) -> Tensor:  # fmt: skip
    weight = Prepared(codes, scale, sums, factor, zero, group, Geometry(tuple(codes.shape)))
    grid = StaticInput(act_scale, act_zero, inverse_balance)
    q = launch.quantize_matrix(x.reshape(-1, x.shape[-1]), grid, weight.channels)
    y = launch.product(q, weight, grid, None, bias, x.dtype)
    return y.view(*x.shape[:-1], scale.shape[0])


def linear_dynamic(
    x: Tensor, codes: Tensor, scale: Tensor, sums: Tensor, factor: Optional[Tensor], zero: Optional[Tensor],  # noqa: UP045
    group: int, inverse_balance: Optional[Tensor], bias: Optional[Tensor], bits: int,  # noqa: UP045
) -> Tensor:  # fmt: skip
    weight = Prepared(codes, scale, sums, factor, zero, group, Geometry(tuple(codes.shape)))
    rows = launch.quantize_rows(x.reshape(-1, x.shape[-1]), inverse_balance, bits, weight.channels)
    y = launch.product(rows.codes, weight, None, rows, bias, x.dtype)
    return y.view(*x.shape[:-1], scale.shape[0])


def conv2d_static(
    x: Tensor, codes: Tensor, scale: Tensor, sums: Tensor, factor: Optional[Tensor], zero: Optional[Tensor],  # noqa: UP045
    group: int, act_scale: Tensor, act_zero: Tensor, inverse_balance: Optional[Tensor], bias: Optional[Tensor],  # noqa: UP045
    shape: list[int], place: list[int],
) -> Tensor:  # fmt: skip
    """shape: of the weight, [N, C, kh, kw]; place: stride, padding and dilation, two numbers each."""
    geometry = _geometry(shape, place)
    weight = Prepared(codes, scale, sums, factor, zero, group, geometry)
    grid = StaticInput(act_scale, act_zero, inverse_balance)
    return _convolve(x, launch.quantize_image(x, grid, weight.channels, geometry.padding), weight, grid, bias)


def conv2d_static_normed(x: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None, norm: Norm) -> Tensor:
    """`conv2d_static` of SiLU(norm(x)); a plain function only."""
    affine = launch.group_norm(x, *norm)
    q = launch.quantize_image(x, grid, weight.channels, weight.geometry.padding, affine, silu=True)
    return _convolve(x, q, weight, grid, bias)


def _convolve(x: Tensor, q: Tensor, weight: Prepared, grid: StaticInput, bias: Tensor | None) -> Tensor:
    """q: the codes of x, or of what was made of it."""
    n = weight.geometry.shape[0]
    size = x.shape[0], *weight.geometry.output_size(x.shape[2], x.shape[3])
    y = launch.product(q, weight, grid, None, bias, x.dtype, size)
    return y.view(*size, n).permute(0, 3, 1, 2)


def _geometry(shape: list[int], place: list[int]) -> Geometry:
    return Geometry(tuple(shape), (place[0], place[1]), (place[2], place[3]), (place[4], place[5]))


def _like_linear(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _like_conv(x: Tensor, *rest: object) -> Tensor:
    shape, place = rest[-2:]
    height, width = _geometry(shape, place).output_size(x.shape[2], x.shape[3])  # type: ignore[arg-type]
    return x.new_empty(x.shape[0], height, width, shape[0]).permute(0, 3, 1, 2)  # type: ignore[index]


OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "linear_static": (linear_static, _like_linear),
    "linear_dynamic": (linear_dynamic, _like_linear),
    "conv2d_static": (conv2d_static, _like_conv),
}


def _registered() -> bool:
    """Whether torch took all of them as custom operations. One that does not (a schema that it cannot read, in some
    version of it) is a matter of torch.compile alone, which then leaves its graph for a layer."""
    try:
        for name, (function, like) in OPERATIONS.items():
            torch.library.custom_op(f"tfmq::{name}", function, mutates_args=()).register_fake(like)
    except Exception as error:  # what torch raises here differs from version to version
        logging.warning("TFMQ: torch.compile breaks its graphs at integer layers (%s: %s)", type(error).__name__, error)
        return False
    return True


def _plain(name: str, *arguments: object) -> Tensor:
    return OPERATIONS[name][0](*arguments)


REGISTERED = _registered()
# Not by a decorator: it imports the compiler, which takes a second.
_outside_of_graphs = _plain if REGISTERED else torch.compiler.disable(_plain)


def run(name: str, *arguments: object) -> Tensor:
    """An operation by its name: the plain function, or under torch.compile the custom operation."""
    if not torch.compiler.is_compiling():
        return OPERATIONS[name][0](*arguments)
    if REGISTERED:
        return getattr(torch.ops.tfmq, name)(*arguments)  # type: ignore[no-any-return]
    return _outside_of_graphs(name, *arguments)
