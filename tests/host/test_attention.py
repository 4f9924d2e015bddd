"""The attention of a quantized MODEL on a CPU: the faster one, right, and only where it may stand in."""

import pytest
import torch
from torch.nn import functional as F

from support import patchers

ours = patchers.module("tfmq.host.faster.attention")

from comfy.ldm.modules import attention  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

pytestmark = pytest.mark.rounding

SHAPES = {
    "self": (2, 64, 64, 8, 5),
    "text": (2, 50, 77, 2, 16),
    "text, padded": (2, 1030, 77, 2, 16),
    "one token": (1, 1, 1, 1, 4),
    "nine": (9, 3, 7, 3, 8),
}
REPLACED = [
    attention.attention_sub_quad, attention.attention_split, attention.attention_basic, attention.attention_pytorch
]  # fmt: skip
OPTIONS = {ours.KEY: ours.faster_attention}


def tensors(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    batch, tokens, others, heads, channels = SHAPES[name]
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(batch, n, heads * channels, generator=g).to(dtype) for n in (tokens, others, others))
    return q, k, v, heads


def exact(q, k, v, heads, mask=None):
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("function", REPLACED, ids=lambda f: f.__name__)
def test_it_is_right(name, dtype, bound, function, monkeypatch):
    used = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", _spy(F.scaled_dot_product_attention, used))
    q, k, v, heads = tensors(name, dtype)
    want = exact(q, k, v, heads)
    got = function(q, k, v, heads, transformer_options=OPTIONS)
    assert [mask is not None for mask in used] == ["padded" in name]
    assert got.dtype is dtype and got.shape == q.shape
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)


def test_every_argument_arrives():
    q, k, v, heads = tensors("text, padded", torch.float32)
    apart = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    want = exact(q, k, v, heads)
    by_place = attention.attention_sub_quad(*apart, heads, None, None, True, transformer_options=OPTIONS)
    by_name = attention.attention_sub_quad(
        apart[0], k=apart[1], v=apart[2], heads=heads, skip_reshape=True, skip_output_reshape=True,
        transformer_options=OPTIONS,
    )  # fmt: skip
    torch.testing.assert_close(by_place.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_name.transpose(1, 2).flatten(2).double(), want, rtol=1e-5, atol=1e-5)


def test_heads_apart_beside_a_query_with_heads_together(monkeypatch):
    """What the host's functions take as well (WAN Animate): the last dimension but one is the heads."""
    used = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", _spy(F.scaled_dot_product_attention, used))
    q, k, v, heads = tensors("text, padded", torch.float32)
    apart = [x.unflatten(-1, (heads, -1)) for x in (k, v)]
    got = attention.attention_sub_quad(q, *apart, heads, transformer_options=OPTIONS)
    assert used == [None]
    torch.testing.assert_close(got.double(), exact(q, k, v, heads), rtol=1e-5, atol=1e-5)


def _spy(function, used):
    def spy(*args, **kwargs):
        used.append(kwargs.get("attn_mask"))
        return function(*args, **kwargs)

    return spy


@pytest.mark.parametrize("place", ["by name", "in its place"])
def test_a_mask_is_left_to_the_host(place, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the faster attention was called")

    monkeypatch.setattr(attention, "attention_pytorch", refuse)
    q, k, v, heads = tensors("text", torch.float32)
    mask = torch.zeros(q.shape[1], k.shape[1])
    mask[:, 40:] = -1e4
    if place == "by name":
        got = attention.attention_sub_quad(q, k, v, heads, mask=mask, transformer_options=OPTIONS)
    else:
        got = attention.attention_sub_quad(q, k, v, heads, mask, transformer_options=OPTIONS)
    torch.testing.assert_close(got.double(), exact(q, k, v, heads, mask.double()), rtol=1e-5, atol=1e-5)


def test_what_a_person_chose_stays():
    calls = []

    def chosen(q, *_args, **_kwargs):
        calls.append(q)
        return q

    q = torch.ones(1, 2, 4)
    assert ours.faster_attention(chosen, q, q, q, 1) is q and len(calls) == 1
    model = ModelPatcher(torch.nn.Linear(1, 1), torch.device("cpu"), torch.device("cpu"))
    model.model_options["transformer_options"][ours.KEY] = chosen
    ours.attach(model)
    assert model.model_options["transformer_options"][ours.KEY] is chosen
    gpu = ModelPatcher(torch.nn.Linear(1, 1), torch.device("cuda"), torch.device("cpu"))
    ours.attach(gpu)
    assert ours.KEY not in gpu.model_options["transformer_options"]


def test_a_quantized_model_has_it_and_its_base_has_not(base, quantized):
    assert quantized.model_options["transformer_options"][ours.KEY] is ours.faster_attention
    assert quantized.clone().model_options["transformer_options"][ours.KEY] is ours.faster_attention
    assert ours.KEY not in base.model_options["transformer_options"]


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_advised_where_it_helps_and_works(base, quantized, monkeypatch, fast):
    precision = patchers.module("tfmq.host.faster.precision")
    monkeypatch.setattr(precision, "fast_bfloat16", lambda: fast)
    said = precision.advice(quantized)
    assert ("ModelComputeDtype" in said) == fast
    half = quantized.clone()
    half.set_model_compute_dtype(torch.bfloat16)  # what that node does
    assert precision.advice(half) == ""
    if fast:
        error = patchers.distance(patchers.sample(half), patchers.sample(base))
        assert error < 0.1
