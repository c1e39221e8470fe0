"""The processor of each architecture: what turns text and images into its inputs, without torch."""

import functools
import warnings
from pathlib import Path
from typing import Any

from jaxlora.data.gemma3 import Gemma3Processor
from jaxlora.data.llava import load_llava
from jaxlora.data.mllama import MllamaProcessor
from jaxlora.data.processor_files import TOKENIZER_FILES, load_tokenizer, read_image_config
from jaxlora.data.qwen_vl import QWEN2_5_VL, QWEN3_VL, QwenVLProcessor

# One line a model_type whose processor is more than a tokenizer.
PROCESSORS = {
    "gemma3": Gemma3Processor.from_pretrained,
    "llava": load_llava,
    # A feature is of 2 x 2 patches where no file says otherwise.
    "mistral3": functools.partial(load_llava, merge=2),
    "mllama": MllamaProcessor.from_pretrained,
    "qwen2_vl": QwenVLProcessor.from_pretrained,
    "qwen2_5_vl": functools.partial(QwenVLProcessor.from_pretrained, family=QWEN2_5_VL),
    "qwen3_vl": functools.partial(QwenVLProcessor.from_pretrained, family=QWEN3_VL),
}


def load_processor(folder: str | Path, model_type: str, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """The processor of a vision-language model, else the tokenizer, else None with a warning that says what the folder lacks."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        warnings.warn(f"{folder} has none of {', '.join(TOKENIZER_FILES)}: the model loads without a tokenizer", stacklevel=2)
        return None
    if model_type not in PROCESSORS:
        return load_tokenizer(folder)
    if read_image_config(folder) is None:
        warnings.warn(f"{folder} has no image processor configuration: {model_type} loads with its tokenizer alone", stacklevel=2)
        return load_tokenizer(folder)
    return PROCESSORS[model_type](folder, min_pixels=min_pixels, max_pixels=max_pixels)
