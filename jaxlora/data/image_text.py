"""What the processors of models share that see images (no videos) in the places of tokens: calls, placeholders, files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from jaxlora.data.padding import Inputs
from jaxlora.data.positions import Grid
from jaxlora.data.processor import CallOptions, Processor, check_options, flat, load_images
from jaxlora.data.processor_files import load_tokenizer, read_config, write_json
from jaxlora.data.rows import media_of

_WHOLE = "processor_config.json"


class ImageTextProcessor(Processor):
    """A processor of images whose features take the places of tokens. ``image_token`` is the placeholder; a subclass says what it becomes.

    ``processor_class`` is transformers' own.
    """

    processor_class: str

    def __init__(self, image_processor: Any, tokenizer: Any, image_token: str):
        super().__init__(image_processor, tokenizer)
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    def grid_of(self, size: tuple[int, int], frames: int | None = None) -> Grid:
        """(1, h, w) in patches of an image of size (width, height).

        Raises:
          ValueError: for a video.
        """
        raise NotImplementedError

    def tokens_of(self, grid: Grid) -> np.ndarray:
        """The ids that an image's placeholder becomes."""
        raise NotImplementedError

    def grids(self, vision: Mapping[str, np.ndarray]) -> list[Grid]:
        """(1, h, w) in patches of each image, from its inputs."""
        if "image_grid_thw" in vision:
            return [(int(t), int(h), int(w)) for t, h, w in vision["image_grid_thw"]]
        return [self.grid_of((0, 0)) for _ in vision.get("pixel_values", ())]

    def whole_config(self) -> dict[str, Any]:
        """What processor_config.json holds besides the class."""
        raise NotImplementedError

    def write(self, folder: Path) -> None:
        """Writes the tokenizer's, the image processor's and the whole processor's files."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        config = json.loads((folder / "preprocessor_config.json").read_text())
        write_json(folder / "preprocessor_config.json", {**config, "processor_class": self.processor_class})
        write_json(folder / _WHOLE, {**self.whole_config(), "processor_class": self.processor_class})

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **options: Unpack[CallOptions]) -> Inputs:
        """input_ids, attention_mask, token types where the model has them, and where there are images theirs.

        Raises:
          ValueError: images and placeholders differ in number (the row is named), truncation would cut an image, or there are videos.
          TypeError: an unknown option.
        """
        check_options(options, CallOptions.__annotations__)
        vision = {**self.image_inputs(flat(images)), **self.video_inputs(videos or [])}
        texts = [text] if isinstance(text, str) else list(text)
        special = options.get("add_special_tokens", True)
        ids = [self.tokenizer(self.prepare(one), add_special_tokens=special)["input_ids"] for one in texts]
        rows = [row for row, _ in self.expand([np.array(row, np.int64) for row in ids], vision)]
        padded = self.padded(rows, options)
        return Inputs({**padded, **self.token_types(padded["input_ids"]), **vision})

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """The ids of an image's tokens."""
        return (self.image_token_id,)

    def expand(
        self, rows: Sequence[np.ndarray], vision: Mapping[str, np.ndarray], names: Sequence[str] | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per row: (ids with all tokens of an image, the index of the unexpanded token that each came from).

        Raises:
          ValueError: names the row where images run out, or says how many are left over.
        """
        left, expanded = self.grids(vision), []
        for name, ids in zip(names or [f"row {i}" for i in range(len(rows))], rows, strict=True):
            pieces = [np.array([token]) for token in ids]
            for at in np.flatnonzero(ids == self.image_token_id):
                if not left:
                    raise ValueError(f"{name}: more image placeholders in the text than images")
                pieces[at] = self.tokens_of(left.pop(0))
            source = np.repeat(np.arange(len(ids)), [len(piece) for piece in pieces])
            expanded.append((np.concatenate(pieces).astype(np.int64) if pieces else ids, source))
        if left:
            raise ValueError(f"row {len(rows) - 1}: {len(left)} images more than placeholders; put a {{'type': 'image'}} part in a message")
        return expanded

    def measure(self, text: str, image_sizes: Sequence[tuple[int, int]] = ()) -> tuple[int, int]:
        """(tokens, patches) of a rendered text with images of (width, height)."""
        grids = [self.grid_of(size) for size in image_sizes]
        tokens = len(self.tokenizer(self.prepare(text), add_special_tokens=False)["input_ids"])
        return tokens + sum(len(self.tokens_of(grid)) - 1 for grid in grids), sum(h * w for _, h, w in grids)

    def image_inputs(self, images: Sequence[Any], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """pixel_values [images, channels, height, width], or nothing where there is no image; errors carry the image's name."""
        if not images:
            return {}
        return self.pixels(load_images(images, names))

    def pixels(self, images: Sequence[Any]) -> dict[str, np.ndarray]:
        """The inputs of one image or more."""
        return {"pixel_values": np.stack(self.image_processor(list(images))["pixel_values"])}

    def inputs_of_chats(self, chats: Sequence[Any], texts: Sequence[str]) -> Inputs:
        """The inputs of rendered conversations, with their images."""
        images = [image for chat in chats for image in media_of(chat, "image")]
        return self(images or None, list(texts), add_special_tokens=False, padding=True)


def read_folder(folder: Path, name: str, **limits: int | None) -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(tokenizer, image processor's configuration, the processor's, the model's) of a folder.

    Raises:
      FileNotFoundError: no tokenizer or no image processor in the folder.
      ValueError: ``limits`` (min_pixels, max_pixels), which these processors do not have.
    """
    tokenizer, config = load_tokenizer(folder), read_config(folder, "preprocessor_config.json", "image_processor")
    if tokenizer is None or config is None:
        raise FileNotFoundError(f"{folder} has no {'tokenizer' if tokenizer is None else 'image processor configuration'}")
    if any(limit is not None for limit in limits.values()):
        raise ValueError(f"min_pixels and max_pixels mean nothing for {name}, whose preprocessor_config.json says the size of images")
    whole, model = (json.loads(path.read_text()) if path.is_file() else {} for path in (folder / _WHOLE, folder / "config.json"))
    return tokenizer, config, whole, model
