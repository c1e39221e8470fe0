"""The files of a processor's folder: the tokenizer, and transformers 4's and 5's configurations of images and videos."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_IMAGE_KEYS = (
    *("do_resize", "resample", "size", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb"),
    *("patch_size", "temporal_patch_size", "merge_size"),
)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer with its chat template, or None where there is none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    older = folder / "chat_template.json"
    if not tokenizer.chat_template and older.is_file():
        tokenizer.chat_template = json.loads(older.read_text())["chat_template"]
    return tokenizer


def read_config(folder: Path, own_file: str, section: str) -> dict[str, Any] | None:
    """A file of its own (transformers 4), or a section of processor_config.json (5)."""
    if (folder / own_file).is_file():
        return json.loads((folder / own_file).read_text())
    together = folder / "processor_config.json"
    return json.loads(together.read_text()).get(section) if together.is_file() else None


def read_image_config(folder: Path) -> dict[str, Any] | None:
    """The arguments of the Qwen-VL image processor, or None where the folder has none."""
    config = read_config(folder, "preprocessor_config.json", "image_processor")
    if config is None:
        return None
    kept = {key: config[key] for key in _IMAGE_KEYS if config.get(key) is not None}
    return {**kept, "size": size_of(config, dict(Qwen2VLImageProcessorPil.size))}


def size_of(config: Mapping[str, Any], default: Mapping[str, int]) -> dict[str, int]:
    """Limits in pixels: size's shortest_edge and longest_edge, which older files call min_pixels and max_pixels."""
    size = config.get("size") or {}
    older = given(shortest_edge=config.get("min_pixels"), longest_edge=config.get("max_pixels"))
    within = given(shortest_edge=size.get("min_pixels"), longest_edge=size.get("max_pixels"))
    named = given(shortest_edge=size.get("shortest_edge"), longest_edge=size.get("longest_edge"))
    return {**default, **within, **named, **older}


def given(**values: int | None) -> dict[str, int]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As transformers writes configurations: sorted keys, two spaces."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
