"""A vision tower without adapters is run, and never differentiated."""

import jax
import pytest
from flax import nnx

from jaxlora.adapt import LoRAConfig, attach, partition
from jaxlora.nn.stack import linear_paths
from jaxlora.select import by_flags
from jaxlora.train.loss import loss_sum
from jaxlora.train.remat import execution
from jaxlora.train.step import merge_trees, value_and_grad
from tests.jaxlora.models import llava


def products(function, *arguments):
    """How many matrix products the function's program has."""
    return jax.jit(function).trace(*arguments).lower().as_text().count("stablehlo.dot_general")


@pytest.mark.parametrize("vision", [False, True])
def test_images_add_only_forward_products_where_the_tower_is_frozen(vision):
    model, seeing = llava.loaded("llava").model, llava.micro("llava")
    blind = llava.micro("llava", {"input_ids": llava.inputs("llava")["input_ids"][1:2, :17]}, patches=0, rows=1)
    attach(model, by_flags(linear_paths(model), vision=vision), LoRAConfig(r=2, init_lora_weights=False))
    graphdef, trainable, frozen = partition(model)
    run = execution(True)

    def forward(micro):
        return loss_sum(nnx.merge(graphdef, merge_trees(trainable, frozen)), micro, run, head_grad=False)

    def gradient(micro):
        return value_and_grad(graphdef, trainable, frozen, jax.tree.map(lambda a: a[None], micro), run)

    added = {f: products(f, seeing) - products(f, blind) for f in (forward, gradient)}
    assert (added[gradient] > added[forward] > 0) if vision else (added[gradient] == added[forward] > 0)
