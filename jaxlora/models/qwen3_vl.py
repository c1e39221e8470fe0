"""Qwen3-VL (Bai et al. 2025, arXiv:2511.21631): a Qwen3 decoder whose first layers get features of several blocks of its vision tower."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from conversion.hf_config import rope, take
from conversion.rules import Rules, Spelling, same
from jaxlora.models import image_text, qwen_vl, text
from jaxlora.models.spec import ModelSpec
from jaxlora.nn.decoder import DecoderConfig
from jaxlora.nn.deepstack import DeepstackTower
from jaxlora.nn.vision import VisionConfig

# Frequencies for time, height and width where a file does not say: those of every released model.
_SECTION = (24, 20, 20)


def read(config: Mapping[str, Any]) -> qwen_vl.QwenVLConfig:
    """Reads a config.json: ``vision_config`` and ``text_config``, whose first layers are as many as the blocks that features leave."""
    whole = qwen_vl.read(config, _read_text, _read_vision)
    layers, leaving = whole.text.num_hidden_layers, len(whole.vision.deepstack_blocks)
    if leaving > layers:
        raise ValueError(f"features leave the tower after {leaving} blocks, but the text model has {layers} layers")
    return dataclasses.replace(whole, text=dataclasses.replace(whole.text, deepstack_layers=leaving))


def _read_text(config: Mapping[str, Any], tied: bool) -> DecoderConfig:
    used = take(config, uses=text.common(max_position_embeddings=128000) | {"attention_bias": False}, requires={"hidden_act": "silu"})
    positions = rope(config, theta=5e5)
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if given.get("mrope_interleaved") is False:
        raise ValueError("mrope_interleaved = False is not implemented; Qwen3-VL's positions are interleaved")
    positions = dataclasses.replace(positions, mrope_section=positions.mrope_section or _SECTION, mrope_interleaved=True)
    bias = used["attention_bias"]
    # The flag may be in either place.
    used |= {"tie_word_embeddings": tied or used["tie_word_embeddings"], "head_dim": used["head_dim"] or 128}
    windows = (None,) * used["num_hidden_layers"]
    return text.sizes(used, positions, windows, qkv_bias=bias, o_bias=bias, qk_norm=True)


def _read_vision(config: Mapping[str, Any]) -> VisionConfig:
    uses = qwen_vl.vision_keys(patch_size=16) | {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "out_hidden_size": 3584,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": (8, 16, 24),
    }
    used = take(config, uses=uses, requires={"hidden_act": "gelu_pytorch_tanh"})
    side = math.isqrt(used["num_position_embeddings"])
    if side**2 != used["num_position_embeddings"]:
        raise ValueError(f"num_position_embeddings = {used['num_position_embeddings']} is no square")
    return qwen_vl.vision_config(
        used,
        embed_dim=used["hidden_size"],
        out_features=used["out_hidden_size"],
        mlp_dim=used["intermediate_size"],
        patch_bias=True,
        position_side=side,
        deepstack_blocks=tuple(used["deepstack_visual_indexes"]),
    )


RULES = Rules(
    (Spelling("hub", same("model.visual", "model.language_model", "lm_head")),),
    ties={"lm_head.weight": "model.language_model.embed_tokens.weight"},
)

TINY = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "vision_start_token_id": 321,
    "vision_end_token_id": 322,
    "image_token_id": 324,
    "video_token_id": 325,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "vocab_size": 331,
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": 512,
        "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 3, 3], "mrope_interleaved": True},
    },
    "vision_config": {
        "depth": 4,
        "hidden_size": 40,
        "intermediate_size": 84,
        "out_hidden_size": 72,
        "hidden_act": "gelu_pytorch_tanh",
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [1, 2],
    },
}

SPEC = ModelSpec(
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    read=read,
    build=functools.partial(qwen_vl.QwenVL, tower=DeepstackTower),
    rules=RULES,
    values=functools.partial(qwen_vl.values_of, read_config=read, frames_apart=True),
    lengthen=image_text.lengthen,
    tiny=TINY,
)
