"""Parameters of a module as plain copies for as long as something is trained."""

import torch
from torch import nn

from tfmq.rounding.forwards import plain_parameters

CPU = torch.device("cpu")


def test_copies_come_and_go():
    with torch.inference_mode():
        module = nn.Sequential(nn.Linear(3, 2).half(), nn.Linear(2, 2).half())
    first, second = module[0].weight, module[1].weight
    with plain_parameters(module, {module[1]}, CPU):
        inside = module[0].weight
        assert inside is not first and not inside.is_inference() and inside.dtype == torch.float32
        assert torch.equal(inside, first.float()) and module[1].weight is second
    assert module[0].weight is first
    with plain_parameters(module, set(), CPU, widen=False):
        assert module[0].weight.dtype == torch.float16


def test_a_patch_that_the_host_merges_as_it_streams_is_in_the_copy():
    module = nn.Linear(3, 2)
    module.weight_lowvram_function = lambda weight: weight.add_(1)
    before = module.weight.detach().clone()
    with plain_parameters(module, set(), CPU):
        assert torch.equal(module.weight, before + 1)
    assert torch.equal(module.weight, before)
