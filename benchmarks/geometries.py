"""Real models' sizes as config.json holds them; weights are drawn, so only speed and memory mean anything."""

from collections.abc import Mapping
from typing import Any

_LLAMA_3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
_QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False, "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}  # fmt: skip

GEOMETRIES: Mapping[str, Mapping[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 5e5,
        "rope_scaling": _LLAMA_3_ROPE,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
        "rope_theta": 1e6, "tie_word_embeddings": False,
    },
    "qwen2-vl-7b": {
        "model_type": "qwen2_vl", "max_position_embeddings": 32768, **_QWEN_7B,
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_chans": 3,
        },
    },
    "qwen2.5-vl-7b": {
        "model_type": "qwen2_5_vl", "max_position_embeddings": 128000, **_QWEN_7B,
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "num_heads": 16, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_chans": 3, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
    },
    "llama-3.2-11b-vision": {
        "model_type": "mllama", "image_token_index": 128256,
        "text_config": {
            "model_type": "mllama_text_model", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
            "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "max_position_embeddings": 131072, "rope_scaling": _LLAMA_3_ROPE,
            "pad_token_id": 128004,
        },
        "vision_config": {
            "model_type": "mllama_vision_model", "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
            "num_global_layers": 8, "attention_heads": 16, "image_size": 560, "patch_size": 14, "max_num_tiles": 4,
            "intermediate_layers_indices": [3, 7, 15, 23, 30], "vision_output_dim": 7680, "norm_eps": 1e-5,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
    },
    "pixtral-12b": {
        "model_type": "llava", "image_token_index": 10, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": {
            "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 14336, "num_hidden_layers": 40,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e9,
            "max_position_embeddings": 1024000, "sliding_window": None,
        },
        "vision_config": {
            "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "head_dim": 64, "image_size": 1024, "patch_size": 16, "hidden_act": "silu", "rope_theta": 1e4,
        },
    },
    "gemma-3-12b": {
        "model_type": "gemma3", "mm_tokens_per_image": 256, "image_token_index": 262144, "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "text_config": {
            "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024,
            "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "max_position_embeddings": 131072,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 896, "patch_size": 14, "vision_use_head": False,
        },
    },
}  # fmt: skip


def text_layers(config: Mapping[str, Any]) -> int:
    """The layers of the text model."""
    return config.get("text_config", config)["num_hidden_layers"]


def with_layers(config: Mapping[str, Any], layers: int | None) -> Mapping[str, Any]:
    """The config with another number of text layers; None: its own."""
    if layers is None:
        return config
    if "text_config" not in config:
        return {**config, "num_hidden_layers": layers}
    return {**config, "text_config": {**config["text_config"], "num_hidden_layers": layers}}
