"""Llama 3.2 Vision's processor: text and images to the model's inputs, without torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from jaxlora.data.padding import Inputs
from jaxlora.data.positions import Grid
from jaxlora.data.processor import CallOptions, Processor, check_options, load_images
from jaxlora.data.processor_files import load_tokenizer, read_config, write_json
from jaxlora.data.rows import media_of
from jaxlora.data.tiles import cross_attention_mask, stack_tiles

_IMAGE_KEYS = (
    "do_resize resample size do_rescale rescale_factor do_normalize image_mean image_std do_convert_rgb do_pad max_image_tiles"
).split()
# Of every released model; a folder with a config.json says so itself.
_PATCH_SIZE = 14


class MllamaProcessor(Processor):
    """The processor of Llama 3.2 Vision: an image is one token ``<|image|>``, and up to 4 tiles of pixels that text attends to.

    ``pixel_values`` are [rows, images, tiles, channels, height, width], with ``aspect_ratio_ids`` [rows, images] (0: no image),
    ``aspect_ratio_mask`` [rows, images, tiles] and, in a call with text, ``cross_attention_mask`` [rows, tokens, images, tiles].
    """

    name = "Llama 3.2 Vision"

    def __init__(self, image_processor: MllamaImageProcessorPil, tokenizer: Any, patch_size: int = _PATCH_SIZE):
        super().__init__(image_processor, tokenizer)
        self.patch_size = patch_size
        self.image_token = "<|image|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> "MllamaProcessor":
        """Reads transformers 4's preprocessor_config.json or 5's processor_config.json.

        Raises:
          FileNotFoundError: no tokenizer or no image processor in the folder.
          ValueError: ``min_pixels`` or ``max_pixels``, since tiles have one size.
        """
        folder = Path(folder)
        tokenizer, config = load_tokenizer(folder), read_config(folder, "preprocessor_config.json", "image_processor")
        if tokenizer is None or config is None:
            raise FileNotFoundError(f"{folder} has no {'tokenizer' if tokenizer is None else 'image processor configuration'}")
        if min_pixels is not None or max_pixels is not None:
            raise ValueError("Llama 3.2 Vision cuts images into tiles of one size: min_pixels and max_pixels mean nothing for it")
        made = MllamaImageProcessorPil(**{key: config[key] for key in _IMAGE_KEYS if config.get(key) is not None})
        model = read_config(folder, "config.json", "") or {}
        return cls(made, tokenizer, model.get("vision_config", {}).get("patch_size", _PATCH_SIZE))

    def write(self, folder: Path) -> None:
        """Writes the tokenizer's and the image processor's files."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        config = read_config(folder, "preprocessor_config.json", "")
        write_json(folder / "preprocessor_config.json", {**(config or {}), "processor_class": "MllamaProcessor"})

    def __call__(self, images: Any = None, text: Any = None, **options: Unpack[CallOptions]) -> Inputs:
        """input_ids and attention_mask, and where there are images what the class says: ``images`` are one, a list, or a list a text.

        A text without the token that begins texts gets it, after leading images.

        Raises:
          ValueError: images and placeholders differ in number (the row is named), or truncation would cut an image.
          TypeError: an unknown option.
        """
        check_options(options, CallOptions.__annotations__)
        texts = [text] if isinstance(text, str) else list(text)
        special = options.get("add_special_tokens", True)
        rows = [np.array(self.tokenizer(self._begun(one), add_special_tokens=special)["input_ids"], np.int64) for one in texts]
        shared = _by_row(images, [int((row == self.image_token_id).sum()) for row in rows])
        vision = [self.image_inputs(own, [f"row {i}, image {k}" for k in range(len(own))]) for i, own in enumerate(shared)]
        for i, (row, own) in enumerate(zip(rows, vision, strict=True)):
            self.expand([row], own, [f"row {i}"])
        made = self.padded(rows, options)
        if any(vision):
            made |= stack_tiles(vision)
            tiles = [own["aspect_ratio_mask"][0].sum(-1).tolist() if own else [] for own in vision]
            most_tiles = self.image_processor.max_image_tiles
            made["cross_attention_mask"] = cross_attention_mask(list(made["input_ids"]), tiles, self.image_token_id, most_tiles)
        return Inputs(made)

    def _begun(self, text: str) -> str:
        bos = self.tokenizer.bos_token
        if bos in text:
            return text
        rest = text
        while rest.startswith(self.image_token):
            rest = rest.removeprefix(self.image_token)
        return f"{text[: len(text) - len(rest)]}{bos}{rest}"

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """The placeholder of images."""
        return (self.image_token_id,)

    def expand(
        self, rows: Sequence[np.ndarray], vision: Mapping[str, np.ndarray], names: Sequence[str] | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per row: (its ids, the index of each): a placeholder stays one token.

        Raises:
          ValueError: names the row where images run out, or says how many are left over.
        """
        named, ratios = names or [f"row {i}" for i in range(len(rows))], vision.get("aspect_ratio_ids")
        left = len(vision.get("image_grid_thw", ())) if ratios is None else int((ratios > 0).sum())
        for name, ids in zip(named, rows, strict=True):
            left -= int((ids == self.image_token_id).sum())
            if left < 0:
                raise ValueError(f"{name}: more image placeholders in the text than images")
        if left:
            raise ValueError(f"{named[-1]}: {left} images more than placeholders; put a {{'type': 'image'}} part in a message")
        return [(ids, np.arange(len(ids))) for ids in rows]

    def grid_of(self, size: tuple[int, int], frames: int | None = None) -> Grid:
        """(tiles, h, w) of an image, in patches: all tiles, whether it fills them or not, since the model computes them all.

        Raises:
          ValueError: for a video.
        """
        self.refuse_video(frames)
        made = self.image_processor
        return made.max_image_tiles, made.size["height"] // self.patch_size, made.size["width"] // self.patch_size

    def measure(self, text: str, image_sizes: Sequence[tuple[int, int]] = ()) -> tuple[int, int]:
        """(tokens, patches) of a rendered text with images of (width, height)."""
        tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return tokens, sum(t * h * w for t, h, w in map(self.grid_of, image_sizes))

    def image_inputs(self, images: Sequence[Any], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The images of one row, [1, images, …], or nothing where there is none; errors carry the image's name."""
        if not images:
            return {}
        made = self.image_processor([load_images(images, names)])
        return {name: np.asarray(made[name]) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}

    def inputs_of_chats(self, chats: Sequence[Any], texts: Sequence[str]) -> Inputs:
        """The inputs of rendered conversations, with their images."""
        images = [media_of(chat, "image") for chat in chats]
        return self(images if any(images) else None, list(texts), add_special_tokens=False, padding=True)


def _by_row(images: Any, counts: Sequence[int]) -> list[list[Any]]:
    """The images of each row: a list a row, or one list (or image), of which each row takes as many as it has placeholders.

    >>> _by_row(["a", "b"], [1, 0, 1])
    [['a'], [], ['b']]

    What is left over is the last row's.
    """
    given = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    if any(isinstance(own, list | tuple) for own in given):
        if len(given) != len(counts):
            raise ValueError(f"{len(given)} lists of images for {len(counts)} texts")
        return [list(own) for own in given]
    ends = np.cumsum([0, *counts])
    return [given[start : end if i < len(counts) else len(given)] for i, (start, end) in enumerate(zip(ends, ends[1:], strict=False), 1)]
