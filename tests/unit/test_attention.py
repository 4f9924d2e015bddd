"""Attention over few keys, padded to whole vectors: against the same without."""

import pytest
import torch
from torch.nn import functional as F

from tfmq.runtime.key_padding import LEAST_QUERIES, MOST_KEYS, VECTOR, whole_vectors

pytestmark = pytest.mark.rounding

QUERIES = max(LEAST_QUERIES.values())


@pytest.mark.parametrize("keys", [1, 15, 17, 77, 154, 255])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str
)
def test_the_padding_has_no_weight(keys: int, dtype: torch.dtype, bound: float) -> None:
    g = torch.Generator().manual_seed(keys)
    q = torch.randn(2, 3, QUERIES, 8, generator=g).to(dtype)
    # All scores below zero: a padded key that took part would have the greatest of all.
    k, v = -torch.rand(2, 2, 3, keys, 8, generator=g).to(dtype)
    q = q.abs()
    padded = whole_vectors(q, k, v)
    assert padded is not None
    assert padded[0].shape[-2] == padded[1].shape[-2] == padded[2].shape[-1] == -(-keys // VECTOR) * VECTOR
    got = F.scaled_dot_product_attention(q, *padded[:2], attn_mask=padded[2])
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_it_is_no_faster_nothing_is_padded(dtype: torch.dtype) -> None:
    def padded(queries: int, keys: int, values: int, batch: int = 1) -> bool:
        q = torch.zeros(1, queries, 4, dtype=dtype)
        k, v = torch.zeros(batch, keys, 4, dtype=dtype), torch.zeros(batch, values, 4, dtype=dtype)
        return whole_vectors(q, k, v) is not None

    least = LEAST_QUERIES[dtype]
    assert padded(least, 77, 77)
    assert not padded(least - 1, 77, 77)
    assert not padded(least, 80, 80)
    assert not padded(least, MOST_KEYS + 1, MOST_KEYS + 1)
    assert not padded(least, 77, 76)  # for the host to complain about
    assert not padded(least, 77, 77, batch=2)
