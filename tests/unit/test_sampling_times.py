"""Where a calibration looks."""

import math

import pytest
import torch

from tfmq.observe.sampling_times import ndtc, nearest_steps, uniform_log_snr


def test_uniform_in_log_snr():
    t = torch.arange(1, 1000).float()
    log_snr = -2 * torch.log(t)  # sigma = t
    chosen = uniform_log_snr(4, t, log_snr)
    gaps = torch.log(chosen).diff()
    assert chosen[0] == 999.0 and chosen[-1] == 1.0
    assert torch.allclose(gaps, gaps.mean().expand(3), atol=0.05)
    with pytest.raises(ValueError, match="finite"):
        uniform_log_snr(4, t, log_snr.clone().fill_(math.inf))


def test_ndtc_is_a_normal_without_a_heap_at_the_ends():
    t = ndtc(20000, 0.0, 999.0, seed=1)
    assert t.min() >= 0 and t.max() <= 999
    assert (t < 10).float().mean() < 0.02 and (t > 989).float().mean() < 0.02
    # The cut normal of mean 0.4 and deviation 0.4 has its mean at 0.4533.
    assert float(t.mean()) / 999 == pytest.approx(0.4533, abs=0.01)
    assert torch.equal(t, ndtc(20000, 0.0, 999.0, seed=1))


def test_a_step_is_found_by_its_timestep_and_not_by_its_number():
    run = torch.tensor([999.0, 666.0, 333.0, 0.0])  # step 0 is the noisiest
    assert nearest_steps(torch.tensor([0.0, 990.0, 340.0]), run).tolist() == [3, 0, 2]


def test_none_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        ndtc(0, 0.0, 1.0)
