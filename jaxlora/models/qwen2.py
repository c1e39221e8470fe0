"""Qwen2 and Qwen2.5 (text)."""

from collections.abc import Mapping
from typing import Any

from conversion.hf_config import rope, take
from jaxlora.models import text
from jaxlora.models.spec import ModelSpec
from jaxlora.nn.decoder import DecoderConfig


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json; q, k and v always have biases; with ``use_sliding_window`` the layers from ``max_window_layers`` on slide."""
    used = take(config, uses=text.common() | text.QWEN_WINDOWS, requires={"hidden_act": "silu"})
    return text.sizes(used, rope(config, theta=1e4), text.qwen_windows(used), qkv_bias=True)


TINY = {
    "model_type": "qwen2",
    "vocab_size": 331,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "use_sliding_window": True,
    "sliding_window": 9,
    "max_window_layers": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
}

SPEC = ModelSpec(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read=read,
    build=text.CausalLM,
    rules=text.RULES,
    values=text.values,
    lengthen=text.lengthen,
    tiny=TINY,
)
