"""What the text models of the Llama family share: the module, the names, the reading of common config keys."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from conversion.hf_config import REQUIRED, Rope
from conversion.rules import Rules, Spelling, same
from jaxlora.data.batches import Batch
from jaxlora.data.inputs import ModelValues
from jaxlora.nn.decoder import Decoder, DecoderConfig, Execution, Head, head_of
from jaxlora.nn.linear import Linear
from jaxlora.nn.rope import lengthened
from jaxlora.typing import Array, Float, Int
from jaxlora.weights.dense import Dense

log = logging.getLogger(__name__)

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
        return head_of(self.lm_head, self.model.embed_tokens, self.config.final_logit_softcapping)

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
    return ModelValues(pad_token_id=0 if pad is None else pad, vocab_size=config["vocab_size"])


def lengthen(config: DecoderConfig, max_seq_length: int) -> DecoderConfig:
    """The config for sequences of that length; the log says what was changed."""
    trained = config.max_position_embeddings
    longer = lengthened(config.rope, trained, max_seq_length)
    if max_seq_length > trained:
        log.warning("max_seq_length=%d is more than the %d that the model was trained on: %s", max_seq_length, trained, longer)
    return dataclasses.replace(config, rope=longer, max_position_embeddings=max(trained, max_seq_length))


def sizes(used: Mapping[str, Any], rope: Rope, windows: tuple[int | None, ...], **options: Any) -> DecoderConfig:
    """A DecoderConfig from the keys that every text architecture has; ``options`` are its own."""
    heads = used["num_attention_heads"]
    return DecoderConfig(
        vocab_size=used["vocab_size"],
        hidden_size=used["hidden_size"],
        intermediate_size=used["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=used["num_key_value_heads"] or heads,
        head_dim=used["head_dim"] or used["hidden_size"] // heads,
        rms_norm_eps=used["rms_norm_eps"],
        max_position_embeddings=used["max_position_embeddings"],
        tie_word_embeddings=used["tie_word_embeddings"],
        rope=rope,
        windows=windows,
        **options,
    )


def common(rms_norm_eps: float = 1e-6, max_position_embeddings: int = 32768) -> dict[str, object]:
    """The keys that every text architecture reads, with the class defaults that apply where a file lacks them."""
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    optional = {
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": rms_norm_eps,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": False,
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": None,
    }
    return {**dict.fromkeys(required, REQUIRED), **optional}


# The keys by which Qwen's configs say which layers slide.
QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}


def qwen_windows(used: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The sliding window of each layer in Qwen's reading: with ``use_sliding_window``, the layers from ``max_window_layers`` on slide."""
    slides, first = used["use_sliding_window"], used["max_window_layers"]
    return layer_windows(used, used["sliding_window"] if slides else None, lambda layer: slides and layer >= first)


def layer_windows(used: Mapping[str, Any], window: int | None, slides: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The sliding window of each layer: from ``layer_types`` where the file has it, else where ``slides(layer)``."""
    types = used.get("layer_types") or ["sliding_attention" if slides(i) else "full_attention" for i in range(used["num_hidden_layers"])]
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown or len(types) != used["num_hidden_layers"]:
        count = used["num_hidden_layers"]
        raise ValueError(f"layer_types must be full_attention or sliding_attention for each of the {count} layers, got {types}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
