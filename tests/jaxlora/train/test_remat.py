"""What the policies keep of a block."""

import collections

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxlora.adapt import LoRAConfig, attach
from jaxlora.load import LoadConfig, load
from jaxlora.nn.attention import LayerInputs
from jaxlora.nn.stack import linear_paths
from jaxlora.select import by_pattern
from jaxlora.train.remat import execution
from tests.jaxlora.reference import reference_folder

S, RANK = 8, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def kept(model_type, policy):
    """(the decoder's configuration, how many arrays of each shape a block keeps of its S tokens)."""
    model = load(reference_folder(model_type), LoadConfig(dtype="float32")).model
    attach(model, by_pattern(linear_paths(model), TARGETS), LoRAConfig(r=RANK))
    decoder, run = model.model, execution(policy)
    graphdef, state = nnx.split(getattr(decoder.layers, decoder.layers.keys[0]))
    layer = jax.tree.map(lambda a: a[0], state)
    segments = (jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), S, jnp.int32))
    shared = decoder.shared(jnp.arange(S)[None], segments, jnp.float32, run)

    def block(x):
        return nnx.merge(graphdef, layer)(x, shared, LayerInputs())[0]

    def residuals(x):
        return jax.tree.leaves(jax.vjp(jax.checkpoint(block, policy=run.scan.policy), x)[1])

    config = decoder.config
    shapes = [leaf.shape for leaf in jax.eval_shape(residuals, jnp.zeros((1, S, config.hidden_size)))]
    tables = [(1, S, config.head_dim)] * 2
    return config, collections.Counter(s for s in shapes if S in s) - collections.Counter(tables)


def _heads(config, count):
    return (1, S, count, config.head_dim)


@pytest.mark.parametrize("policy", ["attention", "dots"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_sums_and_turned_heads_are_kept_in_place_of_the_products_they_come_from(model_type, policy):
    config, found = kept(model_type, policy)
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    turned = [_heads(config, config.num_attention_heads), *[_heads(config, config.num_key_value_heads)] * 2]
    # Of heads that are normed, the norm's backward needs what it normed, which with "dots" is the product.
    heads = [(S, q), (S, kv), (S, kv)] if (model_type, policy) == ("qwen3", "dots") else turned
    state, wide = (1, S, config.hidden_size), [(S, config.intermediate_size)] * (2 if policy == "dots" else 0)
    attention = [_heads(config, config.num_attention_heads), (1, config.num_attention_heads, S)]
    # The block's input and the sum in its middle; attention's output and log-sum-exp; of "dots" gate and up; the columns of seven adapters.
    assert found == collections.Counter([state, state, *heads, *attention, *wide, *[(S, RANK)] * 7])


def test_true_keeps_the_input_and_the_adapters_columns():
    config, found = kept("llama", True)
    assert found == collections.Counter([(1, S, config.hidden_size), *[(S, RANK)] * 7])
