"""Qwen2.5-VL (Bai et al. 2025, arXiv:2502.13923): Qwen2-VL with windowed attention, RMSNorm and SwiGLU in its tower, and timed videos."""

import functools
from collections.abc import Mapping
from typing import Any

from conversion.hf_config import take
from jaxlora.models import image_text, qwen_vl
from jaxlora.models.spec import ModelSpec
from jaxlora.nn.mlp import SwiGLU
from jaxlora.nn.norm import RMSNorm
from jaxlora.nn.vision import VisionConfig, VisionTower


def read(config: Mapping[str, Any]) -> qwen_vl.QwenVLConfig:
    """Reads a config.json. ``vision_config.hidden_size`` is the tower's width; ``window_size`` is in pixels."""
    return qwen_vl.read(config, qwen_vl.read_qwen2_text, _read_vision)


def _read_vision(config: Mapping[str, Any]) -> VisionConfig:
    uses = qwen_vl.vision_keys(patch_size=14) | {
        "depth": 32,
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
        "tokens_per_second": 4,
    }
    used = take(config, uses=uses, requires={"hidden_act": "silu", **qwen_vl.vision_synonyms(config, 14)})
    cell = used["patch_size"] * used["spatial_merge_size"]
    if used["window_size"] < cell:
        raise ValueError(f"window_size = {used['window_size']} pixels is less than one merged cell of {cell}")
    return qwen_vl.vision_config(
        used,
        embed_dim=used["hidden_size"],
        out_features=used["out_hidden_size"],
        mlp_dim=used["intermediate_size"],
        window=used["window_size"] // cell,
        full_blocks=tuple(used["fullatt_block_indexes"]),
        tokens_per_second=float(used["tokens_per_second"]),
    )


tower = functools.partial(VisionTower, norm=RMSNorm, mlp=functools.partial(SwiGLU, bias=True))

TINY = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 331,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 3]},
    "vision_start_token_id": 321,
    "vision_end_token_id": 322,
    "vision_token_id": 323,
    "image_token_id": 324,
    "video_token_id": 325,
    "vision_config": {
        "depth": 4,
        "hidden_size": 40,
        "intermediate_size": 84,
        "out_hidden_size": 72,
        "hidden_act": "silu",
        "num_heads": 2,
        "in_chans": 3,
        "patch_size": 4,
        "spatial_patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 20,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
    },
}

SPEC = ModelSpec(
    model_type="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    read=read,
    build=functools.partial(qwen_vl.QwenVL, tower=tower),
    rules=qwen_vl.RULES,
    values=functools.partial(qwen_vl.values_of, read_config=read),
    lengthen=image_text.lengthen,
    tiny=TINY,
)
