"""Gemma 3, text (Gemma Team 2025, arXiv:2503.19786): five sliding layers to one full, each kind with rotary positions of its own."""

from collections.abc import Mapping
from typing import Any

from conversion.hf_config import rope, take
from jaxlora.models import gemma_shared, text
from jaxlora.models.spec import ModelSpec
from jaxlora.nn.decoder import DecoderConfig


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json; every ``sliding_window_pattern``-th layer is full. Scaling and lengthening are the full layers' alone."""
    patterns = {"sliding_window_pattern": None, "_sliding_window_pattern": None, "rope_local_base_freq": None}
    uses = gemma_shared.common(max_position_embeddings=131072, vocab_size=262208) | patterns
    # transformers reads the attention's cap and does not apply it.
    requires = {**gemma_shared.REQUIRES, "attn_logit_softcapping": None}
    del uses["attn_logit_softcapping"]
    used = take(config, uses=uses, requires=requires, inert=gemma_shared.INERT)
    pattern = used["sliding_window_pattern"] or used["_sliding_window_pattern"] or 6
    windows = text.layer_windows(used, used["sliding_window"], lambda layer: (layer + 1) % pattern != 0)
    full, local = (rope(config, theta=theta, layer_type=f"{kind}_attention") for kind, theta in (("full", 1e6), ("sliding", 1e4)))
    return text.sizes(used, full, windows, local_rope=local, qk_norm=True, **gemma_shared.options(used))


TINY = {
    "model_type": "gemma3_text",
    "vocab_size": 331,
    "hidden_size": 44,
    "intermediate_size": 76,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "rms_norm_eps": 1e-5,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": True,
    "query_pre_attn_scalar": 10,
    "sliding_window": 7,
    "sliding_window_pattern": 3,
    "final_logit_softcapping": 9.0,
    "max_position_embeddings": 512,
    "rope_theta": 1e5,
    "rope_local_base_freq": 1e2,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}

SPEC = ModelSpec(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=read,
    build=text.CausalLM,
    rules=text.RULES,
    values=lambda config: gemma_shared.values(config, read(config)),
    lengthen=text.lengthen,
    tiny=TINY,
)
