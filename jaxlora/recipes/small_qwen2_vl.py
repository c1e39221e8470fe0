"""A Qwen2-VL of half a million weights, in the files of a Hugging Face folder: small enough to be trained on two CPU cores."""

import json
import pathlib

from jaxlora.recipes.digits import PATCH_SIZE, QUESTION, WORDS
from jaxlora.recipes.random_model import write_random_checkpoint
from jaxlora.recipes.tiny_tokenizer import PREPROCESSOR, SPECIAL_TOKENS, make_tokenizer

WIDTH = 96
_IDS = {token: i for i, token in enumerate(SPECIAL_TOKENS["qwen2_vl"])}

CONFIG = {
    "model_type": "qwen2_vl",
    "vocab_size": 384,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 1e4,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 4]},
    "vision_start_token_id": _IDS["<|vision_start|>"],
    "vision_end_token_id": _IDS["<|vision_end|>"],
    "vision_token_id": _IDS["<|vision_pad|>"],
    "image_token_id": _IDS["<|image_pad|>"],
    "video_token_id": _IDS["<|video_pad|>"],
    "bos_token_id": _IDS["<|endoftext|>"],
    "pad_token_id": _IDS["<|endoftext|>"],
    "eos_token_id": _IDS["<|im_end|>"],
    "vision_config": {
        "depth": 4,
        "embed_dim": 64,
        "hidden_size": WIDTH,
        "mlp_ratio": 2,
        "num_heads": 4,
        "in_chans": 3,
        "patch_size": PATCH_SIZE,
        "spatial_patch_size": PATCH_SIZE,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}

# Everything that is ever said, so that each word becomes one token.
_TEXTS = ["system\nYou are a helpful assistant.\n", "user\n", "assistant\n", QUESTION, *WORDS]


def write_checkpoint(folder: pathlib.Path, *, seed: int) -> pathlib.Path:
    """Writes config, random weights in float32, tokenizer, chat template and image processor; returns the folder."""
    make_tokenizer(folder, "qwen2_vl", 100 * _TEXTS)
    # Images between one merged cell and four times the digits' size are left as they are.
    cell = (2 * PATCH_SIZE) ** 2
    sizes = {"patch_size": PATCH_SIZE, "size": {"shortest_edge": cell, "longest_edge": 16 * cell}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **sizes}, indent=2))
    return write_random_checkpoint(folder, CONFIG, seed=seed, dtype="float32")
