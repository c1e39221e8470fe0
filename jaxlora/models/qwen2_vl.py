"""Qwen2-VL (Wang et al. 2024, arXiv:2409.12191): a vision tower whose features replace tokens of a Qwen2 decoder with M-RoPE."""

import functools
from collections.abc import Mapping
from typing import Any

from conversion.hf_config import take
from jaxlora.models import image_text, qwen_vl
from jaxlora.models.spec import ModelSpec
from jaxlora.nn.mlp import PlainMLP
from jaxlora.nn.norm import LayerNorm
from jaxlora.nn.vision import VisionConfig, VisionTower


def read(config: Mapping[str, Any]) -> qwen_vl.QwenVLConfig:
    """Reads a config.json. ``vision_config.embed_dim`` is the tower's width; its ``hidden_size`` is the text model's."""
    return qwen_vl.read(config, qwen_vl.read_qwen2_text, _read_vision)


def _read_vision(config: Mapping[str, Any]) -> VisionConfig:
    uses = qwen_vl.vision_keys(patch_size=14) | {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4}
    used = take(config, uses=uses, requires={"hidden_act": "quick_gelu", **qwen_vl.vision_synonyms(config, 14)})
    width = used["embed_dim"]
    return qwen_vl.vision_config(used, embed_dim=width, out_features=used["hidden_size"], mlp_dim=int(width * used["mlp_ratio"]))


tower = functools.partial(VisionTower, norm=LayerNorm, mlp=functools.partial(PlainMLP, activation="quick_gelu"))

TINY = {
    "model_type": "qwen2_vl",
    "vocab_size": 331,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 3]},
    "vision_start_token_id": 321,
    "vision_end_token_id": 322,
    "vision_token_id": 323,
    "image_token_id": 324,
    "video_token_id": 325,
    "vision_config": {
        "depth": 2,
        "embed_dim": 40,
        "hidden_size": 72,
        "mlp_ratio": 4,
        "num_heads": 2,
        "in_chans": 3,
        "patch_size": 4,
        "spatial_patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}

SPEC = ModelSpec(
    model_type="qwen2_vl",
    architecture="Qwen2VLForConditionalGeneration",
    read=read,
    build=functools.partial(qwen_vl.QwenVL, tower=tower),
    rules=qwen_vl.RULES,
    values=functools.partial(qwen_vl.values_of, read_config=read),
    lengthen=image_text.lengthen,
    tiny=TINY,
)
