"""What tests of several folders share."""

import dataclasses

import pytest

from jaxlora.nn import linear as linear_module
from jaxlora.nn import mlp_products as mlp_module
from jaxlora.nn import pending as pending_module
from jaxlora.nn import products as products_module
from jaxlora.weights import base as base_module

KERNELS = {
    "lora_input": (products_module, (products_module, "INPUT")),
    "adapted_activation": (mlp_module, (mlp_module, "ADAPTED")),
    "gated_gradients": (mlp_module, (linear_module, "GRADIENTS")),
    "plain_gradients": (mlp_module, (linear_module, "PLAIN_GRADIENTS")),
    "norm_gradient": (pending_module, (products_module, "NORM_GRADIENT")),
}
TRACES = (
    products_module.all_products,
    products_module._project_bwd,
    mlp_module._mlp_apart,
    mlp_module._mlp_bwd,
    pending_module._fork_bwd,
)


@pytest.fixture
def in_one_pass(monkeypatch):
    """Takes the paths of some kernels (of gated_gradients alone, unless others are named), which run by their XLA backend.

    Says how often each ran. With lora_input, products have the adapters' columns beside their operands, as on a GPU.
    """
    ran = dict.fromkeys(KERNELS, 0)

    def counted(name, real):
        def run(*args, **kwargs):
            ran[name] += 1
            return real(*args, **kwargs, backend="xla")

        return run

    def take(*names):
        forget()
        for name in names or ("gated_gradients",):
            module, record = KERNELS[name]
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
            if record is not None:
                kernel = getattr(*record)
                monkeypatch.setattr(*record, dataclasses.replace(kernel, refuses=lambda name, *_, **__: None))
        if "lora_input" in names:
            for module in (base_module, products_module, mlp_module):
                monkeypatch.setattr(module, "one_product", lambda width, columns: True)
            for module in (products_module, mlp_module):
                monkeypatch.setattr(module, "MANY_ROWS", 1)
        return ran

    def forget():
        for trace in TRACES:
            trace.clear_cache()

    forget()
    yield take
    forget()
