"""The smallest model that a step can train: an embedding and an adapted head, without layers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlora.adapt import LoRAConfig, attach, partition
from jaxlora.data.batches import make_batch
from jaxlora.data.inputs import ModelValues
from jaxlora.data.ladder import Shape
from jaxlora.nn.decoder import Head
from jaxlora.nn.linear import Linear
from jaxlora.select import by_pattern
from jaxlora.weights.dense import Dense

VOCAB, WIDTH = 11, 4


class Toy(nnx.Module):
    """Hidden states are embeddings."""

    def __init__(self):
        draw = np.random.default_rng(0).standard_normal((VOCAB, WIDTH)).astype(np.float32)
        self.config = None
        self.table = nnx.Param(jnp.asarray(draw))
        self.lm_head = Linear(WIDTH, VOCAB, dtype=jnp.float32)
        self.lm_head.weight.set_value(Dense(jnp.asarray(draw[::-1].copy())))

    def __call__(self, batch, execution, *, caches=None, column=None):
        return self.table.get_value()[batch.input_ids], None

    def head(self):
        return Head(self.lm_head.weight.get_value(), self.lm_head.lora)

    def init_caches(self, batch, length, dtype):
        raise NotImplementedError("a toy does not generate")


def parts():
    """(graphdef, trainable, frozen)."""
    model = Toy()
    attach(model, by_pattern(["lm_head"], ["lm_head"]), LoRAConfig(r=2, lora_alpha=4))
    return partition(model)


def with_table(frozen, value):
    """The frozen tree with every embedding set to ``value``."""
    return {**frozen, "table": jnp.full((VOCAB, WIDTH), value)}


def batches(*, labelled=True):
    """Batches of random tokens, for ever."""
    rng = np.random.default_rng(1)
    while True:
        ids = rng.integers(1, VOCAB, (2, 8))
        labels = ids if labelled else np.full_like(ids, -100)
        yield make_batch([{"input_ids": ids, "labels": labels}], ModelValues(pad_token_id=0), Shape(8), rows=2)


def copied(tree):
    """A copy that survives the donation of its source."""
    return jax.tree.map(jnp.array, tree)
