"""Mistral 7B, Nemo and Small (text)."""

from collections.abc import Mapping
from typing import Any

from conversion.hf_config import rope, take
from jaxlora.models import text
from jaxlora.models.spec import ModelSpec
from jaxlora.nn.decoder import DecoderConfig


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json; a sliding window applies to every layer, and is 4096 unless the file says null."""
    uses = text.common(max_position_embeddings=131072) | {"sliding_window": 4096, "layer_types": None}
    used = take(config, uses=uses, requires={"hidden_act": "silu"})
    window = config.get("sliding_window", 4096)
    return text.sizes(used, rope(config, theta=1e4), text.layer_windows(used, window, lambda layer: window is not None))


TINY = {
    "model_type": "mistral",
    "vocab_size": 331,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 20,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "sliding_window": 7,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rope_theta": 1e4,
}

SPEC = ModelSpec(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=read,
    build=text.CausalLM,
    rules=text.RULES,
    values=text.values,
    lengthen=text.lengthen,
    tiny=TINY,
)
