"""Gemma 3's processor: text and images to the model's inputs, without torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from jaxlora.data.image_text import ImageTextProcessor, read_folder
from jaxlora.data.positions import Grid

_IMAGE_KEYS = "do_resize resample size do_rescale rescale_factor do_normalize image_mean image_std do_convert_rgb".split()
# Of every released model; a folder with a config.json says so itself.
_PATCH_SIZE = 14


class Gemma3Processor(ImageTextProcessor):
    """The processor of Gemma 3: every image is one square of pixels and the same number of tokens.

    ``<start_of_image>`` in a text becomes ``\\n\\n<start_of_image>``, the soft tokens, ``<end_of_image>\\n\\n``; ``pixel_values`` are
    [images, channels, height, width]. Pan-and-scan (crops of long images besides the whole) is not modelled.
    """

    name, processor_class = "Gemma 3", "Gemma3Processor"

    def __init__(
        self, image_processor: Gemma3ImageProcessorPil, tokenizer: Any, image_seq_length: int = 256, patch_size: int = _PATCH_SIZE
    ):
        super().__init__(image_processor, tokenizer, "<image_soft_token>")
        self.image_seq_length, self.patch_size = image_seq_length, patch_size
        self.boi_token, self.eoi_token = "<start_of_image>", "<end_of_image>"

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> "Gemma3Processor":
        """Reads transformers 4's preprocessor_config.json or 5's processor_config.json.

        Raises:
          FileNotFoundError: no tokenizer or no image processor in the folder.
          NotImplementedError: the configuration asks for pan-and-scan.
          ValueError: ``min_pixels`` or ``max_pixels``, since all images have one size.
        """
        tokenizer, config, whole, model = read_folder(Path(folder), cls.name, min_pixels=min_pixels, max_pixels=max_pixels)
        if config.get("do_pan_and_scan"):
            raise NotImplementedError(f"{folder} asks for do_pan_and_scan, which is not modelled; set it to false")
        made = Gemma3ImageProcessorPil(**{key: config[key] for key in _IMAGE_KEYS if config.get(key) is not None})
        patch = model.get("vision_config", {}).get("patch_size", _PATCH_SIZE)
        return cls(made, tokenizer, whole.get("image_seq_length") or model.get("mm_tokens_per_image") or 256, patch)

    def whole_config(self) -> dict[str, Any]:
        """The tokens of an image."""
        return {"image_seq_length": self.image_seq_length}

    def prepare(self, text: str, videos: Iterable[tuple[int, float]] = ()) -> str:
        """A rendered text as it is tokenised, with one soft token an image: the white space joins that of the text around it."""
        return text.replace(self.boi_token, f"\n\n{self.boi_token}{self.image_token}{self.eoi_token}\n\n")

    def token_types(self, input_ids: np.ndarray) -> dict[str, np.ndarray]:
        """token_type_ids: 0 text, 1 image."""
        return {"token_type_ids": (input_ids == self.image_token_id).astype(np.int64)}

    def tokens_of(self, grid: Grid) -> np.ndarray:
        """As many soft tokens for every image."""
        return np.full(self.image_seq_length, self.image_token_id)

    def grid_of(self, size: tuple[int, int], frames: int | None = None) -> Grid:
        """(1, h, w) in patches of an image, whatever its size.

        Raises:
          ValueError: for a video.
        """
        self.refuse_video(frames)
        made = self.image_processor.size
        return 1, made["height"] // self.patch_size, made["width"] // self.patch_size
