"""What the text models of the Llama family share: the module, the names, the reading of common config keys."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from conversion.rules import Rules, Spelling, same
from jaxlora.data.batches import Batch, ModelValues
from jaxlora.nn.decoder import Decoder, DecoderConfig, Execution, Head, head_of
from jaxlora.nn.linear import Linear
from jaxlora.typing import Array, Float, Int
from jaxlora.weights.dense import Dense

RULES = Rules((Spelling("hub", same("model", "lm_head")),), ties={"lm_head.weight": "model.embed_tokens.weight"})


class CausalLM(nnx.Module):
    """A decoder and its output head, under the paths ``model`` and ``lm_head``."""

    def __init__(self, config: DecoderConfig, *, dtype: Any = jnp.bfloat16):
        self.config = config
        self.model = Decoder(config, path="model", dtype=dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, tied=config.tie_word_embeddings)

    def __call__(
        self, batch: Batch, execution: Execution, *, caches: Any = None, column: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Final hidden states of one micro-batch."""
        segments = (batch.segment_starts, batch.segment_lengths)
        return self.model(self.model.embed_tokens(batch.input_ids), batch.position_ids, segments, execution, caches=caches, column=column)

    def head(self) -> Head:
        """The output head: its own weight, or the embedding's table."""
        return head_of(self.lm_head, self.model.embed_tokens)

    def embed_table(self) -> Dense:
        """The embedding's table."""
        return self.model.embed_tokens.table

    def init_caches(self, batch: int, length: int, dtype: Any) -> tuple[Array, Array]:
        """Empty (k, v) caches [L, B, T, K, C]."""
        return init_caches(self.config, batch, length, dtype)


def init_caches(config: DecoderConfig, batch: int, length: int, dtype: Any) -> tuple[Array, Array]:
    """Empty (k, v) caches [L, B, T, K, C]."""
    shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def values(config: Mapping[str, Any]) -> ModelValues:
    """What batches need of a text model."""
    pad = config.get("pad_token_id")
    return ModelValues(pad_token_id=0 if pad is None else pad)
