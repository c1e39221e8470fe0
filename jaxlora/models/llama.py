"""Llama 2, 3 and their relatives."""

from collections.abc import Mapping
from typing import Any

from conversion.hf_config import rope, take
from jaxlora.models import text
from jaxlora.models.spec import ModelSpec
from jaxlora.nn.decoder import DecoderConfig


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json; ``attention_bias`` puts biases on q, k, v and o."""
    uses = text.common(max_position_embeddings=2048) | {"attention_bias": False, "mlp_bias": False}
    used = take(config, uses=uses, requires={"hidden_act": "silu"})
    return text.sizes(
        used,
        rope(config, theta=1e4),
        (None,) * used["num_hidden_layers"],
        qkv_bias=used["attention_bias"],
        o_bias=used["attention_bias"],
        mlp_bias=used["mlp_bias"],
    )


TINY = {
    "model_type": "llama",
    "vocab_size": 331,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": True,
    "mlp_bias": True,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

SPEC = ModelSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=read,
    build=text.CausalLM,
    rules=text.RULES,
    values=text.values,
    lengthen=text.lengthen,
    tiny=TINY,
)
