"""The config.json of every tower that LLaVA has, and Mistral 3's, by the name of its reference."""

from jaxlora.models import mistral3
from jaxlora.models.llava import TINY

TEXT = {
    "model_type": "mistral",
    "vocab_size": 331,
    "hidden_size": 44,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "rms_norm_eps": 1e-5,
    "sliding_window": 7,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 12,
    "patch_size": 4,
    "vision_use_head": False,
}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 20,
    "image_size": 24,
    "patch_size": 4,
    "hidden_act": "silu",
    "rope_theta": 1e2,
}
WHOLE = {"model_type": "llava", "image_token_index": 324, "pad_token_id": 3, "vision_feature_select_strategy": "full"}
CONFIGS = {
    "llava": TINY,
    "llava_siglip": {**WHOLE, "vision_feature_layer": -2, "multimodal_projector_bias": False, "text_config": TEXT, "vision_config": SIGLIP},
    "llava_pixtral": {**WHOLE, "vision_feature_layer": -1, "text_config": TEXT, "vision_config": PIXTRAL},
    "mistral3": mistral3.TINY,
}
