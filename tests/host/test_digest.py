"""What a calibration is found again by: equal for equal requests, different for everything that changes a run."""

import hashlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from support import loras, patchers

import comfy.controlnet  # isort: skip
import comfy.hooks  # isort: skip
import comfy_extras.nodes_model_advanced as sampling_nodes  # isort: skip

ours = patchers.module("tfmq.host.digest")
model = patchers.module("tfmq.host.model")


def digest(value):
    found = hashlib.sha256()
    ours.update_digest(found, value)
    return found.hexdigest()


def freeu(strength, picture=None):
    def patch(h):
        return h * strength if picture is None else h + picture

    return patch


class Adapter:
    def __init__(self, weight):
        self.weight = weight

    def patch(self, x):
        return x * self.weight


def linear(value):
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, value)
    nn.init.zeros_(layer.bias)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        freeu,
        lambda v: freeu(1.0, torch.full((3,), v)),
        lambda v: partial(freeu, v),
        lambda v: Adapter(v).patch,
        lambda v: {"patches": {"attn": [Adapter(torch.full((2, 2), v))]}},
        linear,
        lambda v: SimpleNamespace(inner=SimpleNamespace(value=v)),
    ],
)
def test_what_an_object_holds_counts(make):
    assert digest(make(1.0)) == digest(make(1.0)) != digest(make(2.0))


def test_an_object_that_holds_itself_ends():
    one = SimpleNamespace()
    one.me = one
    assert digest(one)


def test_what_a_run_leaves_behind_does_not_count():
    used = SimpleNamespace(strength=1.0, cond_hint=torch.ones(2), timestep_range=(1.0, 0.0), _current_keyframe=3)
    fresh = SimpleNamespace(strength=1.0, cond_hint=None, timestep_range=None, _current_keyframe=None)
    assert digest(used) == digest(fresh) != digest(SimpleNamespace(**{**vars(fresh), "strength": 0.5}))


def control(value, strength, weight=1.0):
    return comfy.controlnet.ControlNet(linear(weight)).set_cond_hint(torch.full((1, 3, 8, 8), value), strength)


def test_a_controlnet_by_picture_strength_and_weights():
    def request(*about):
        return digest([[torch.ones(1, 4), {"control": control(*about)}]])

    assert request(0.5, 1.0) == request(0.5, 1.0)
    assert len({request(0.5, 1.0), request(0.6, 1.0), request(0.5, 0.9), request(0.5, 1.0, 2.0)}) == 4


def test_a_hooked_lora_by_strength_and_weights():
    def request(strength, seed=0):
        hooks = comfy.hooks.create_hook_lora(loras.kohya({"a": torch.Size((4, 4))}, seed=seed), strength, 0.0)
        return digest(comfy.hooks.set_hooks_for_conditioning(patchers.conditioning(1), hooks))

    assert request(1.0) == request(1.0)
    assert len({request(1.0), request(0.5), request(1.0, seed=1)}) == 3


def test_the_schedule_of_a_model(base):
    plain, zsnr = base, sampling_nodes.ModelSamplingDiscrete().patch(base, "eps", True)[0]
    assert model.sampling_kind(plain) == model.sampling_kind(zsnr)
    assert digest(model.sampling_values(plain)) == digest(model.sampling_values(base.clone()))
    assert digest(model.sampling_values(plain)) != digest(model.sampling_values(zsnr))
