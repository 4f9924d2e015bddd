"""The one list of a layer's tensors: nothing is lost on the way through it, and what is needed must be there."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tfmq.files import MODEL, read_tensors, write
from tfmq.rounding.checkpoint import read_unit, write_unit
from tfmq.rounding.units import Unit
from tfmq.scheme import DYNAMIC, NF4, NONE, STATIC, Scheme
from tfmq.state import TENSORS, LayerState, Rounded

N, K, INTERVALS = 6, 64, 3


def number(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(0, 16, shape).to(dtype)


@st.composite
def schemes(draw: Any) -> tuple[Scheme, tuple[int, ...]]:
    form = draw(st.sampled_from([8, 4, NF4]))
    shape = (N, K) if form == NF4 or draw(st.booleans()) else (N, K, 3, 1)
    balanced = draw(st.booleans())
    if form == NF4:
        return Scheme(4, 16, NONE, weight_format=NF4), shape
    activation = draw(st.sampled_from([STATIC, DYNAMIC, NONE]))
    rotation = draw(st.sampled_from([0, 16])) if len(shape) == 2 else 0
    branches = draw(st.integers(1, 2)) if activation == STATIC else 1
    permuted = bool(rotation) and draw(st.booleans())
    group = draw(st.sampled_from([0, 32])) if form == 8 else 32  # 8 bits may name one, left over from 4
    return Scheme(form, 8, activation, balanced, branches, rotation, group, permuted=permuted), shape


def state_of(scheme: Scheme, shape: tuple[int, ...]) -> LayerState:
    entries = torch.Size(shape).numel() // N
    eight = scheme.weight_bits == 8
    found: dict[str, Tensor] = {
        "codes": number(*shape, dtype=torch.int8) if eight else number(N, entries // 2, dtype=torch.uint8),
        "scale": number(N) + 0.5,
    }
    if not eight and scheme.group:
        found |= {name: number(N, entries // scheme.group, dtype=torch.uint8) for name in ("factor", "zero")}
    if scheme.balanced:
        found["balance"] = number(K) + 0.5
    if scheme.permuted:
        found["permutations"] = torch.randperm(K).to(torch.int16).unsqueeze(0)
    if scheme.activation == STATIC:
        table = (INTERVALS,) if scheme.branches == 1 else (2, INTERVALS)
        found |= {"act_scale": number(*table) + 0.5, "act_zero_point": number(*table, dtype=torch.int32)}
    return LayerState("conv2d" if len(shape) == 4 else "linear", scheme, shape, **found)  # type: ignore[arg-type]


def same(one: Any, other: Any) -> bool:
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return False
        if isinstance(a, Tensor):
            if a.dtype != b.dtype or not torch.equal(a, b):
                return False
        elif a != b:
            return False
    return type(one) is type(other)


@settings(max_examples=80, deadline=None)
@given(schemes())
def test_any_scheme_there_and_back(drawn: tuple[Scheme, tuple[int, ...]]) -> None:
    state = state_of(*drawn)
    parts = state.tensors()
    assert set(parts) <= set(TENSORS)
    assert state.nbytes == sum(tensor.nbytes for tensor in parts.values())
    every = {name: parts.get(name) for name in TENSORS}
    assert same(state, LayerState.from_tensors(state.kind, state.scheme, state.shape, every))
    assert same(state, state.to("cpu"))


def test_to_another_device() -> None:
    moved = state_of(Scheme(4, group=32, balanced=True), (N, K)).to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"} and len(moved.tensors()) == 7


@settings(max_examples=40, deadline=None)
@given(schemes(), st.data())
def test_what_a_scheme_needs_must_be_there(drawn: tuple[Scheme, tuple[int, ...]], data: st.DataObject) -> None:
    state = state_of(*drawn)
    parts = state.tensors()
    for name in ("balance", "permutations"):  # a calibration may have none
        parts.pop(name, None)
    lost = data.draw(st.sampled_from(sorted(parts)))
    del parts[lost]
    with pytest.raises(KeyError, match=lost):
        LayerState.from_tensors(state.kind, state.scheme, state.shape, parts)


def test_through_a_file(tmp_path: Path) -> None:
    state = state_of(Scheme(4, group=32, balanced=True, branches=2, rotation=16, permuted=True), (N, K))
    write(tmp_path / "one.safetensors", state.tensors(), {"kind": MODEL})
    found = read_tensors(tmp_path / "one.safetensors")
    assert same(state, LayerState.from_tensors("linear", state.scheme, (N, K), found))


def test_a_rounding_to_8_bits_needs_no_groups() -> None:
    rounded = Rounded(number(N, K, 3, 1, dtype=torch.int8), torch.rand(N), note="n")
    assert set(rounded.tensors()) == {"codes", "scale"}
    assert same(rounded, Rounded.from_tensors(0, "n", rounded.tensors())) and same(rounded, rounded.to("cpu"))


@pytest.mark.parametrize("tuned", [False, True])
def test_a_rounding_goes_through_its_file(tuned: bool, tmp_path: Path) -> None:
    def draw(note: str) -> Rounded:
        table = (torch.rand(2, INTERVALS), number(2, INTERVALS, dtype=torch.int32)) if tuned else (None, None)
        grid = torch.rand(N), *(number(N, 2, dtype=torch.uint8) for _ in range(2)), 32
        return Rounded(number(N, K, dtype=torch.uint8), *grid, *table, note)

    unit = Unit("block", ("block.a", "block.ab"))
    rounded = {layer: draw(f"how {layer} went") for layer in unit.layers}
    write_unit(tmp_path, unit, rounded, (2.0, 1.0))
    keys = set(read_tensors(next(tmp_path.iterdir())))
    names = {"codes", "scale", "factor", "zero"} | ({"act_scale", "act_zero_point"} if tuned else set())
    assert keys == {f"{layer}:{name}" for layer in unit.layers for name in names}
    found = read_unit(tmp_path, unit)
    assert found is not None and found[1] == (2.0, 1.0)
    assert all(same(found[0][layer], rounded[layer]) for layer in unit.layers)


def test_a_rounding_that_lacks_something_is_no_rounding(tmp_path: Path) -> None:
    rounded = Rounded(number(N, K, dtype=torch.uint8), torch.rand(N), number(N, 2), number(N, 2), 32)
    parts = rounded.tensors()
    del parts["zero"]
    with pytest.raises(KeyError, match="zero"):
        Rounded.from_tensors(32, "", parts)
