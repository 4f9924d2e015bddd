"""Settings for all tests."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Test machines are slow and shared: time per example says nothing.
settings.register_profile("tfmq", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tfmq")

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _the_same_numbers_in_any_order() -> None:
    """A test that draws from a global generator gets the same numbers whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
