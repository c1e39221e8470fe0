"""What tests of several folders share."""

import dataclasses

import pytest

from jaxlora.nn import linear as linear_module
from pallas_kernels.gated_gradients import KERNEL, gated_gradients


@pytest.fixture
def in_one_pass(monkeypatch):
    """Takes the path of a kernel that makes the wide gradients, with the backend that runs anywhere; says how often."""
    ran = []

    def gradients(*args, **kwargs):
        ran.append(1)
        return gated_gradients(*args, **kwargs, backend="xla")

    def take():
        monkeypatch.setattr(linear_module, "GRADIENTS", dataclasses.replace(KERNEL, refuses=lambda name, *_, **__: None))
        monkeypatch.setattr(linear_module, "gated_gradients", gradients)
        return ran

    linear_module._mlp_bwd.clear_cache()
    yield take
    linear_module._mlp_bwd.clear_cache()
