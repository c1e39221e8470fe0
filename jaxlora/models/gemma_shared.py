"""What the text models of the Gemma family share: the keys of their configs, and what these switch on in the decoder."""

from collections.abc import Mapping
from typing import Any

from jaxlora.data.inputs import ModelValues
from jaxlora.models import text
from jaxlora.nn.decoder import DecoderConfig

REQUIRES: Mapping[str, object] = {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": (False, None)}
# ``hidden_activation`` counts; files also carry the older key, with values that were never meant.
INERT = ("hidden_act",)


def common(max_position_embeddings: int, vocab_size: int) -> dict[str, object]:
    """The keys that they read. Hub files leave out what transformers' classes have as defaults, the sizes included."""
    return text.common(max_position_embeddings=max_position_embeddings) | {
        "vocab_size": vocab_size,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def values(config: Mapping[str, Any], read: DecoderConfig) -> ModelValues:
    """What batches need; the pad token is 0 unless the file says otherwise."""
    pad = config.get("pad_token_id")
    return ModelValues(pad_token_id=0 if pad is None else pad, vocab_size=read.vocab_size)


def options(used: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's fields that Gemma 2 and 3 set."""
    if used["sliding_window"] is None:
        raise ValueError("sliding_window is null; a Gemma's sliding layers need one")
    return {
        "qkv_bias": used["attention_bias"],
        "o_bias": used["attention_bias"],
        "hidden_act": "gelu_pytorch_tanh",
        "centred_norms": True,
        "post_norms": True,
        "scaled_embeddings": True,
        "query_pre_attn_scalar": used["query_pre_attn_scalar"],
        "attn_logit_softcapping": used.get("attn_logit_softcapping"),
        "final_logit_softcapping": used["final_logit_softcapping"],
    }
