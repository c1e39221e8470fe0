"""What every training benchmark is fed, ours and the rivals', in numpy alone and under Hugging Face's names.

A row is random text whose every token is a label. A model that sees gets one image a row, as its own processor would give it, and is
trained on the text after it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

SEED = 0
IGNORE = -100
# Text is drawn from ids that are special in none of the tokenizers here.
TEXT_IDS = (1000, 128_000)
# Text before the image.
PREFIX = 3
# 1,024 image tokens for Qwen-VL, 256 for Gemma 3, four tiles for Llama 3.2 Vision.
SIDE = 896
# 1,024 image tokens and 32 that end rows: 896 pixels would be 3,192, more than the 2,048 tokens of a row.
PIXTRAL_SIDE = 512

Inputs = dict[str, np.ndarray]
Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Image:
    """The image of every row: its tokens, the patches that the tower sees, and the inputs of a batch of them beside its tokens."""

    tokens: np.ndarray
    patches: int
    inputs: Inputs


def token_ids(rows: int, sequence: int, vocab_size: int) -> np.ndarray:
    """The text of a batch, [rows, sequence]: the same ids wherever it is asked for.

    >>> token_ids(1, 4, 128256).tolist()
    [[109029, 81894, 65914, 35262]]
    """
    low, high = TEXT_IDS
    return np.random.default_rng(SEED).integers(low, min(vocab_size, high), (rows, sequence))


def make_inputs(config: Config, rows: int, sequence: int) -> Inputs:
    """One batch for the model of a config.json: input_ids, attention_mask, labels (not shifted), and what its images need.

    Raises:
      ValueError: no text is left after the image.
    """
    ids = token_ids(rows, sequence, config.get("text_config", config)["vocab_size"])
    labels = ids.copy()
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}
    image = make_image(config, rows)
    if image is None:
        return inputs
    end = PREFIX + len(image.tokens)
    if end >= sequence:
        raise ValueError(f"a row of {sequence} tokens has no room for text after an image that ends at token {end}")
    ids[:, PREFIX:end] = image.tokens
    labels[:, :end] = IGNORE
    return inputs | image.inputs | _token_types(config, ids)


def make_image(config: Config, rows: int) -> Image | None:
    """The image of each of ``rows`` rows; None where the model sees nothing."""
    return IMAGES[config["model_type"]](config, rows) if "vision_config" in config else None


def _pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)


def _qwen(config: Config, rows: int) -> Image:
    vision = config["vision_config"]
    patch, merge, frames = vision["patch_size"], vision["spatial_merge_size"], vision["temporal_patch_size"]
    side = SIDE // patch
    tokens = np.full((side // merge) ** 2 + 2, config["image_token_id"])
    tokens[0], tokens[-1] = config["vision_start_token_id"], config["vision_end_token_id"]
    inputs = {"pixel_values": _pixels(rows * side**2, 3 * frames * patch**2), "image_grid_thw": np.array([[1, side, side]] * rows)}
    return Image(tokens=tokens, patches=side**2, inputs=inputs)


def _mllama(config: Config, rows: int) -> Image:
    vision = config["vision_config"]
    tiles, side = vision["max_num_tiles"], vision["image_size"]
    # 896 x 896 pixels are scaled to 2 x 2 tiles of 560.
    ratio = 1 + [tuple(pair) for pair in vision["supported_aspect_ratios"]].index((2, 2))
    inputs = {
        "pixel_values": _pixels(rows, 1, tiles, 3, side, side),
        "aspect_ratio_ids": np.full((rows, 1), ratio),
        "aspect_ratio_mask": np.ones((rows, 1, tiles), np.int64),
    }
    return Image(tokens=np.array([config["image_token_index"]]), patches=tiles * (side // vision["patch_size"]) ** 2, inputs=inputs)


# The ids of [IMG_BREAK] and [IMG_END] in every released Pixtral; config.json has only that of [IMG].
_BREAK, _END = 12, 13


def _pixtral(config: Config, rows: int) -> Image:
    side = PIXTRAL_SIDE // config["vision_config"]["patch_size"]
    tokens = np.full((side, side + 1), config["image_token_index"])
    tokens[:, -1] = _BREAK
    tokens[-1, -1] = _END
    inputs = {
        "pixel_values": _pixels(rows, 3, PIXTRAL_SIDE, PIXTRAL_SIDE),
        "image_sizes": np.array([[PIXTRAL_SIDE, PIXTRAL_SIDE]] * rows),
    }
    return Image(tokens=tokens.ravel(), patches=side**2, inputs=inputs)


def _gemma3(config: Config, rows: int) -> Image:
    vision = config["vision_config"]
    tokens = np.full(config["mm_tokens_per_image"] + 2, config["image_token_index"])
    tokens[0], tokens[-1] = config["boi_token_index"], config["eoi_token_index"]
    side = vision["image_size"]
    return Image(tokens=tokens, patches=(side // vision["patch_size"]) ** 2, inputs={"pixel_values": _pixels(rows, 3, side, side)})


IMAGES: Mapping[str, Callable[[Config, int], Image]] = {
    "gemma3": _gemma3,
    "llava": _pixtral,
    "mllama": _mllama,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
}
# What transformers calls the array that is 1 at image tokens.
_TOKEN_TYPES = {"gemma3": "token_type_ids", "qwen2_vl": "mm_token_type_ids", "qwen2_5_vl": "mm_token_type_ids"}


def _token_types(config: Config, ids: np.ndarray) -> Inputs:
    name = _TOKEN_TYPES.get(config["model_type"])
    image = config.get("image_token_id", config.get("image_token_index"))
    return {name: (ids == image).astype(np.int64)} if name else {}
