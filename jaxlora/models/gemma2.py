"""Gemma 2 (Riviere et al. 2024, arXiv:2408.00118)."""

from collections.abc import Mapping
from typing import Any

from conversion.hf_config import rope, take
from jaxlora.models import gemma_shared, text
from jaxlora.models.spec import ModelSpec
from jaxlora.nn.decoder import DecoderConfig


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json; every other layer slides, the first included; attention and head cap their logits unless the file says null."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    uses = gemma_shared.common(max_position_embeddings=8192, vocab_size=256000) | caps
    # The first files say the window twice.
    twice = {"sliding_window_size": config.get("sliding_window", uses["sliding_window"])}
    used = take(config, uses=uses, requires={**gemma_shared.REQUIRES, **twice}, inert=gemma_shared.INERT)
    windows = text.layer_windows(used, used["sliding_window"], lambda layer: layer % 2 == 0)
    return text.sizes(used, rope(config, theta=1e4), windows, **gemma_shared.options(used))


TINY = {
    "model_type": "gemma2",
    "vocab_size": 331,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "rms_norm_eps": 1e-5,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 12,
    "sliding_window": 7,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 9.0,
    "max_position_embeddings": 512,
    "attention_bias": True,
    "rope_theta": 1e4,
}

SPEC = ModelSpec(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read=read,
    build=text.CausalLM,
    rules=text.RULES,
    values=lambda config: gemma_shared.values(config, read(config)),
    lengthen=text.lengthen,
    tiny=TINY,
)
