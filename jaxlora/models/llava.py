"""LLaVA 1.5 (Liu et al. 2023, arXiv:2310.03744) and Pixtral: the projected patches of CLIP, SigLIP or Pixtral's tower replace tokens."""

from collections.abc import Mapping
from typing import Any

from jaxlora.data.inputs import ModelValues
from jaxlora.models import llava_shared
from jaxlora.models.image_text import lengthen
from jaxlora.models.llava_shared import LlavaConfig
from jaxlora.models.spec import ModelSpec

_IMAGE_TOKEN = 32000
_OUTER = llava_shared.outer_keys(
    image_token_index=_IMAGE_TOKEN,
    vision_feature_layer=-2,
    vision_feature_select_strategy="default",
    multimodal_projector_bias=True,
    tie_word_embeddings=False,
)
# "default" drops the first state of an image, which is the class token where there is one.
_STRATEGIES = {"clip_vision_model": "default", "siglip_vision_model": "full", "pixtral": "full"}


def read(config: Mapping[str, Any]) -> LlavaConfig:
    """Reads a config.json. A flag in either place ties the head."""
    whole, inner = llava_shared.take_whole(config, _OUTER)
    tower, vision = llava_shared.read_vision(whole["vision_config"])
    strategy = whole["vision_feature_select_strategy"]
    if strategy != _STRATEGIES[tower]:
        raise ValueError(
            f"vision_feature_select_strategy = {strategy!r} is not implemented for {tower}; expected {_STRATEGIES[tower]!r}: a feature "
            "for every patch, and none for a class token"
        )
    decoder = llava_shared.read_text(inner, tied=whole["tie_word_embeddings"] or inner.get("tie_word_embeddings", False))
    return LlavaConfig(
        text=decoder,
        vision=vision,
        tower=tower,
        feature_layer=llava_shared.feature_layer(whole["vision_feature_layer"], vision.num_hidden_layers),
        projector_bias=whole["multimodal_projector_bias"],
        tie_word_embeddings=decoder.tie_word_embeddings,
    )


def values(config: Mapping[str, Any]) -> ModelValues:
    """What batches need, from a config.json."""
    return llava_shared.values(config, read(config), image_token=_IMAGE_TOKEN)


TINY = {
    "model_type": "llava",
    "image_token_index": 324,
    "pad_token_id": 3,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "llama",
        "vocab_size": 331,
        "hidden_size": 44,
        "intermediate_size": 76,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 1e4,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 12,
        "patch_size": 4,
        "projection_dim": 24,
    },
}

SPEC = ModelSpec(
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    read=read,
    build=llava_shared.Llava,
    rules=llava_shared.RULES,
    values=values,
    lengthen=lengthen,
    tiny=TINY,
    unused=llava_shared.unused,
)
