"""Qwen3 (dense text)."""

from collections.abc import Mapping
from typing import Any

from conversion.hf_config import rope, take
from jaxlora.models import text
from jaxlora.models.spec import ModelSpec
from jaxlora.nn.decoder import DecoderConfig


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json; queries and keys are normed per head before they turn."""
    used = take(config, uses=text.common() | text.QWEN_WINDOWS | {"attention_bias": False}, requires={"hidden_act": "silu"})
    used["head_dim"] = used["head_dim"] or 128
    bias = used["attention_bias"]
    return text.sizes(used, rope(config, theta=1e4), text.qwen_windows(used), qkv_bias=bias, o_bias=bias, qk_norm=True)


TINY = {
    "model_type": "qwen3",
    "vocab_size": 331,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
}

SPEC = ModelSpec(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=read,
    build=text.CausalLM,
    rules=text.RULES,
    values=text.values,
    lengthen=text.lengthen,
    tiny=TINY,
)
