"""Tiny checkpoint folders with tokenizers, and models loaded from them."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxlora.models import registry
from jaxlora.recipes.random_model import write_random_checkpoint
from jaxlora.recipes.tiny_tokenizer import PREPROCESSORS, make_tokenizer

VOCAB = 400


def write_folder(folder, model_type, **changes):
    """A random checkpoint with a tokenizer whose ids fit it."""
    family = "pixtral" if model_type == "mistral3" else model_type if model_type in PREPROCESSORS else "llama"
    make_tokenizer(folder, family)
    ids = {entry["content"]: entry["id"] for entry in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    config = {**registry.get(model_type).tiny, "vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    if family == "gemma3":
        config = _gemma3_config(folder, config, ids)
    elif family == "mllama":
        config = _mllama_config(folder, config, ids)
    elif family == "pixtral":
        config = _mistral3_config(folder, config, ids)
    elif family == "qwen2_vl":
        config |= {"vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"]}
        config |= {"vision_token_id": ids["<|vision_pad|>"], "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
        config |= {"vision_config": {**config["vision_config"], "patch_size": 14, "spatial_patch_size": 14}}
        config |= {"eos_token_id": ids["<|im_end|>"]}
    else:
        config |= {"eos_token_id": ids["<|eot_id|>"], "pad_token_id": ids["<|pad|>"]}
    return write_random_checkpoint(folder, {**config, **changes}, seed=1)


def _gemma3_config(folder, config, ids):
    """The tiny config with the tokenizer's ids, and its processor's sizes."""
    size = config["vision_config"]["image_size"]
    image = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**image, "size": {"height": size, "width": size}}))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": config["mm_tokens_per_image"]}))
    tokens = {"image": "<image_soft_token>", "boi": "<start_of_image>", "eoi": "<end_of_image>"}
    sizes = {name: config.pop(name) for name in ("vocab_size", "num_hidden_layers", "max_position_embeddings")}
    config |= {f"{name}_token_index": ids[token] for name, token in tokens.items()}
    return config | {"text_config": {**config["text_config"], **sizes}, "eos_token_id": [ids["<end_of_turn>"]], "pad_token_id": 0}


def _mllama_config(folder, config, ids):
    """The tiny config with the tokenizer's ids, and its processor's size of a tile."""
    size = config["vision_config"]["image_size"]
    image = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**image, "size": {"height": size, "width": size}}))
    own = {name: config.pop(name) for name in ("vocab_size", "max_position_embeddings")}
    layers = {"num_hidden_layers": config.pop("num_hidden_layers") + 1, "cross_attention_layers": [1], "pad_token_id": ids["<|pad|>"]}
    text = {**config["text_config"], **own, **layers}
    return config | {"text_config": text, "image_token_index": ids["<|image|>"], "eos_token_id": [ids["<|eot_id|>"]]}


def _mistral3_config(folder, config, ids):
    """The tiny config with the tokenizer's ids, and its processor's sizes."""
    vision = config["vision_config"]
    image = json.loads((folder / "preprocessor_config.json").read_text())
    own = {"patch_size": {side: vision["patch_size"] for side in ("height", "width")}, "size": {"longest_edge": vision["image_size"]}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**image, **own}))
    sizes = {name: config.pop(name) for name in ("vocab_size", "num_hidden_layers", "max_position_embeddings")}
    tokens = {"image_token_index": ids["[IMG]"], "eos_token_id": ids["</s>"], "pad_token_id": ids["<pad>"]}
    return {**config, **tokens, "text_config": {**config["text_config"], **sizes}}


def picture(seed, width=70, height=56):
    """An image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def vision_row(seed, **size):
    """One row in the form of the OCR script."""
    user = [{"type": "text", "text": "What is the total?"}, {"type": "image", "image": picture(seed, **size)}]
    return {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "OCR assistant"}]},
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": f"The total is {seed}."}]},
        ]
    }


def text_row(i):
    """One conversation."""
    return {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"The answer is {i * i}."}]}


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def qwen2_vl_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("qwen2_vl"), "qwen2_vl")


@pytest.fixture(scope="session")
def gemma3_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("gemma3"), "gemma3")


@pytest.fixture(scope="session")
def mistral3_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("mistral3"), "mistral3")


@pytest.fixture(scope="session")
def mllama_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("mllama"), "mllama")
