"""Settings for all tests."""

import os

from hypothesis import HealthCheck, settings

# Test machines are slow and shared: time per example says nothing.
settings.register_profile("tfmq", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tfmq")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
