"""Packed codes: nothing is lost, and two 4-bit codes take one byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tfmq.temporal.packing import SHIFT, from_halves, pack, signed_zero_point, unpack


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 33), st.sampled_from([4, 8]), st.integers(0, 2**31))
def test_there_and_back(rows: int, columns: int, bits: int, seed: int):
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.nbytes == rows * (columns if bits == 8 else -(-columns // 2))
    back = unpack(packed, bits, columns)
    assert back.dtype is torch.int8 and back.shape == codes.shape
    assert torch.equal(back.int() + (SHIFT if bits == 8 else 0), codes.int())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 255), st.integers(0, 255), st.sampled_from([4, 8]))
def test_the_distance_to_the_zero_point_is_kept(code: int, zero: int, bits: int):
    code, zero = code % 2**bits, zero % 2**bits
    stored = unpack(pack(torch.tensor([[code]], dtype=torch.uint8), bits), bits, 1)
    moved = signed_zero_point(torch.tensor([zero], dtype=torch.int32), bits)
    assert moved.dtype is torch.int8
    assert int(stored.int() - moved.int()) == code - zero


def test_neighbours_share_a_byte():
    assert pack(torch.tensor([[1, 2, 15]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 33), st.integers(0, 2**31))
def test_codes_of_old_files_are_put_in_order(rows: int, columns: int, seed: int):
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    low, high = F.pad(codes, (0, columns % 2)).chunk(2, dim=1)
    assert torch.equal(from_halves(low | (high << 4)), pack(codes, 4))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="at most 15"):
        pack(torch.tensor([[16]], dtype=torch.uint8), 4)
    for function in (lambda x: pack(x, 3), lambda x: unpack(x, 3, 1)):
        with pytest.raises(ValueError, match="4 or 8 bits"):
            function(torch.zeros(1, 1, dtype=torch.uint8))
