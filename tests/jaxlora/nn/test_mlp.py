"""MLPs in tiles of tokens."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlora.nn.attention import LayerInputs, Shared
from jaxlora.nn.decoder import _tile
from jaxlora.nn.mlp import by_tiles
from tests.jaxlora.nn.test_gated import mlp, normal
from tests.jaxlora.nn.test_linear import assert_close

TOKENS = 96


def compiled(tile, rows=3, length=TOKENS // 3):
    """The gradient of a sum over an adapted MLP's output, compiled, with its arguments."""
    graphdef, state = nnx.split(mlp())

    def loss(state, x):
        module = nnx.merge(graphdef, state)
        return jnp.vdot(by_tiles(lambda h: module(h), x, tile), normal(40, *x.shape))

    arguments = nnx.to_pure_dict(state), normal(30, rows, length, 64)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile(), arguments


def test_tiles_change_no_value_and_no_gradient():
    whole, arguments = compiled(None)
    tiled, _ = compiled(TOKENS // 4)
    assert_close(tiled(*arguments), whole(*arguments))


def test_tiles_need_less_memory():
    whole, _ = compiled(None, length=1024)
    tiled, _ = compiled(256, length=1024)
    assert tiled.memory_analysis().temp_size_in_bytes < 0.5 * whole.memory_analysis().temp_size_in_bytes


def test_tokens_that_no_near_number_divides_are_one_tile():
    rows = []
    by_tiles(lambda h: rows.append(h.shape) or h, jnp.zeros((1, 97, 2)), 50)
    assert rows == [(1, 97, 2)]


def test_a_layer_that_drops_is_not_tiled():
    table = (jnp.zeros(1), jnp.zeros(1))
    shared = Shared(table, (jnp.zeros((1, 1), jnp.int32),) * 2, mlp_tile=8)
    assert _tile(shared, LayerInputs()) == 8 and _tile(shared, LayerInputs(keys={"up_proj": jax.random.key(0)})) is None
