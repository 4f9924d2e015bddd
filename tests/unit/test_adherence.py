"""The demo's measure of prompt adherence, on pictures whose truth is known, and the demo's own inputs."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demo import adherence, checkpoint, render

REQUESTS = list(render.REQUESTS)
ATTRIBUTES = [field.name for field in dataclasses.fields(adherence.Adherence)]
PROMPTS = (Path(render.__file__).parent / "prompts.txt").read_text(encoding="utf-8").splitlines()


def _other(attribute: str, value: str, taken: set[str], rng: np.random.Generator) -> str:
    choices = {"shape": render.SHAPES, "size": render.SIZES}.get(attribute, render.COLOURS)
    return str(rng.choice([c for c in choices if c != value and c not in taken]))


def test_rendered_truth_is_read_right():
    wrong: Counter[str] = Counter()
    for seed in range(2):
        rng = np.random.default_rng(seed)
        for request in REQUESTS:
            found = adherence.judge(render.render(request, rng), request)
            wrong.update(name for name in ATTRIBUTES if not getattr(found, name))
    total = 2 * len(REQUESTS)
    assert total == 2 * 672
    assert all(wrong[name] <= 0.03 * total for name in ATTRIBUTES), wrong


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_wrong_attribute_gets_no_credit_and_takes_none_from_the_others(attribute: str):
    rng = np.random.default_rng(5)
    wrong_credit = right_credit = 0
    for request in REQUESTS[::8]:
        value = _other(attribute, getattr(request, attribute), {request.colour, request.background}, rng)
        shown = dataclasses.replace(request, **{attribute: value})
        found = adherence.judge(render.render(shown, rng), request)
        wrong_credit += getattr(found, attribute)
        right_credit += sum(getattr(found, name) for name in ATTRIBUTES if name != attribute)
    count = len(REQUESTS[::8])
    assert wrong_credit <= 0.01 * count
    assert right_credit >= 0.97 * 3 * count


def test_nothing_that_was_asked_for_scores_nothing():
    rng = np.random.default_rng(6)
    scores = []
    for request in REQUESTS[::16]:
        taken = {request.colour, request.background}
        colour = _other("colour", request.colour, taken, rng)
        shown = render.Request(
            _other("size", request.size, set(), rng),
            colour,
            _other("shape", request.shape, set(), rng),
            _other("background", request.background, {*taken, colour}, rng),
        )
        scores.append(adherence.judge(render.render(shown, rng), request).score)
    assert np.mean(scores) <= 0.01


def test_an_empty_picture_has_only_a_background():
    request = render.parse("a small red circle on a blue background")
    empty = np.broadcast_to(np.array(render.COLOURS["blue"]), (64, 64, 3))
    assert adherence.judge(empty, request) == adherence.Adherence(False, False, False, True)


def test_noise_shows_no_shape():
    rng = np.random.default_rng(0)
    assert [adherence.read(rng.random((64, 64, 3))).shape for _ in range(20)] == [None] * 20


def test_other_picture_sizes_are_read():
    request = render.parse("a large green star on a white background")
    assert adherence.judge(render.render(request, np.random.default_rng(1), pixels=96), request).score == 1


def test_mean_score():
    rng = np.random.default_rng(2)
    request = render.parse("a large green star on a white background")
    picture = render.render(request, rng)
    other = dataclasses.replace(request, shape="circle")
    assert adherence.mean_score([picture, picture], [request, other]) == pytest.approx((1 + 0.75) / 2)
    with pytest.raises(ValueError):
        adherence.mean_score([picture], [request, other])


@pytest.mark.parametrize("shape", [(64, 32, 3), (64, 64), (64, 64, 4)])
def test_other_arrays_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="square picture"):
        adherence.read(np.zeros(shape))


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        adherence.read(np.full((64, 64, 3), np.nan))


@given(st.sampled_from(REQUESTS))
def test_a_prompt_reads_back_as_its_request(request: render.Request):
    assert render.parse(str(request)) == request


@settings(max_examples=50)
@given(st.text(max_size=60))
def test_another_text_is_no_prompt(text: str):
    with pytest.raises(ValueError, match="no prompt of the demo model"):
        render.parse(text)


def test_outlines_of_two_shapes_never_look_the_same_however_round():
    names, _, outlines = adherence._outlines()
    for name, outline in zip(names, outlines, strict=True):
        others = outlines[[other != name for other in names]]
        both = np.minimum(others, outline).sum(1)
        assert (both / (others.sum(1) + outline.sum() - both)).max() < 0.96


def test_demo_prompts_are_many_varied_and_balanced():
    assert len(PROMPTS) == len(set(PROMPTS)) >= 64
    # The demo takes the first 32, benchmarks 64 and more: every such part is balanced.
    for count in (32, 64, len(PROMPTS)):
        requests = [render.parse(prompt) for prompt in PROMPTS[:count]]
        for name, choices in (("size", 2), ("colour", 8), ("shape", 6), ("background", 8)):
            counts = Counter(getattr(request, name) for request in requests)
            assert len(counts) == choices
            assert max(counts.values()) - min(counts.values()) <= 2


def test_the_text_encoder_is_the_one_that_the_model_was_trained_on():
    small = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "max_position_embeddings": 4,
        "vocab_size": 5,
        "num_hidden_layers": 12,
    }
    names = sorted(checkpoint._shapes(small))
    assert len(names) == 197
    assert names[0] == "text_model.embeddings.position_embedding.weight" and names[-1] == "text_projection.weight"
    # The seed of a tensor is its place in the sorted names: the first values of three of them, at full size.
    real = small | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "max_position_embeddings": 77,
        "num_hidden_layers": 0,
    }
    tensors = checkpoint.text_encoder(real | {"vocab_size": 49408})
    position = tensors["text_model.embeddings.position_embedding.weight"].flatten()[:3].tolist()
    token = tensors["text_model.embeddings.token_embedding.weight"].flatten()[:3].tolist()
    assert position == pytest.approx([-0.0335, -0.1489, 0.0489], abs=1e-3)
    assert token == pytest.approx([-0.2322, -0.8701, 2.8145], abs=1e-3)
    last_place = names.index("text_model.encoder.layers.11.mlp.fc2.weight")
    assert last_place == 57


def test_the_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tmp_path / "config.json"
    sizes = {"hidden_size": 8, "intermediate_size": 16, "max_position_embeddings": 4, "vocab_size": 5}
    config.write_text(json.dumps(sizes | {"num_hidden_layers": 1}))

    def full(*_, **__):
        raise OSError("disk full")

    target = tmp_path / "out" / "model.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.assemble(config, target)
    assert list(target.parent.iterdir()) == []
    checkpoint.assemble(config, target)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
