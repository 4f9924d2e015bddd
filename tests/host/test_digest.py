"""What a calibration is found again by: equal for equal requests, different for everything that changes a run."""

import copy
import hashlib
import logging
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from support import loras, patchers

import comfy.context_windows  # isort: skip
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


def test_a_parameter_is_the_tensor_that_it_holds():
    assert digest(nn.Parameter(torch.ones(3))) == digest(torch.ones(3)) != digest(torch.zeros(3))


def test_an_object_that_holds_itself_ends():
    one = SimpleNamespace()
    one.me, one.all = one, []
    one.all.append(one.all)
    assert digest(one)


def test_what_a_run_leaves_behind_does_not_count(base):
    hooks = comfy.hooks.create_hook_lora(loras.kohya({"a": torch.Size((4, 4))}), 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=0.5, start_percent=0.4))
    hooks.set_keyframes_on_hooks(frames)
    net = control(0.5, 1.0)
    window = comfy.context_windows.IndexListContextHandler(
        comfy.context_windows.get_matching_context_schedule("standard_static"),
        comfy.context_windows.get_matching_fuse_method("pyramid"), 4, 1,
    )  # fmt: skip
    before = digest(hooks), digest(net), digest(window)
    for hook in hooks.hooks:
        hook.initialize_timesteps(base.model)
        hook.hook_keyframe.prepare_current_keyframe(torch.tensor(0.1), {"sample_sigmas": torch.tensor([9.0, 0.0])})
    net.pre_run(base.model, lambda percent: 1.0 - percent)
    window._step = 3
    assert (digest(hooks), digest(net), digest(window)) == before


@pytest.mark.parametrize(
    "one, other",
    [
        ({1, 2}, {1, 3}),
        (np.ones(3), np.zeros(3)),
        (b"a", b"b"),
        (torch.float16, torch.float32),
        ({"a": len}, {"a": abs}),
        ({("double", 0): 1}, {("double", 1): 1}),
    ],
)
def test_other_kinds_of_values(one, other):
    assert digest(one) == digest(copy.deepcopy(one)) != digest(other)


def test_whole_programs_are_not_walked_through():
    """Nodes hold loggers, modules and servers."""
    from math import sqrt

    def patch(x):
        return sqrt(torch.sum(x)) if sys.modules else logging.getLogger("x")

    value = SimpleNamespace(log=logging.getLogger(), modules=sys, call=sqrt, patch=patch, kinds=[int, nn.Linear])
    hashes = ours._Hashes(None)
    assert hashes.of(value, ours.DEPTH) == ours._Hashes(None).of(value, ours.DEPTH)
    assert len(hashes.known) < 100


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
