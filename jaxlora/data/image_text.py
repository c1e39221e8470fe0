"""What the processors of models that see images (no videos) share: calls, placeholders, chats, files."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from conversion.atomic import files_into
from jaxlora.data.images import load_image
from jaxlora.data.padding import Inputs, pad_rows, truncate_ids
from jaxlora.data.positions import Grid
from jaxlora.data.processor_files import load_tokenizer, read_config, write_json
from jaxlora.data.rows import media_of, read_messages
from jaxlora.data.turns import renderer
from jaxlora.errors import nearest, raise_all

_WHOLE = "processor_config.json"


class CallOptions(TypedDict, total=False):
    """What `ImageTextProcessor.__call__` takes besides text and images, as in transformers; arrays are always numpy's."""

    padding: bool | str
    truncation: bool
    max_length: int | None
    add_special_tokens: bool
    pad_to_multiple_of: int | None
    return_tensors: str | None


class ImageTextProcessor:
    """A processor without torch. ``image_token`` is the placeholder; a subclass says what an image's tokens are.

    ``name`` is the family's, ``processor_class`` transformers' own.
    """

    name: str
    processor_class: str

    def __init__(self, image_processor: Any, tokenizer: Any, image_token: str):
        self.image_processor, self.tokenizer, self.image_token = image_processor, tokenizer, image_token
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

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the files that transformers' own processor reads; each replaces an older one only when all are written."""
        with files_into(folder) as new:
            self._write(new)

    def _write(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        config = json.loads((folder / "preprocessor_config.json").read_text())
        write_json(folder / "preprocessor_config.json", {**config, "processor_class": self.processor_class})
        write_json(folder / _WHOLE, {**self.whole_config(), "processor_class": self.processor_class})

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's chat template."""
        return self.tokenizer.chat_template

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **options: Unpack[CallOptions]) -> Inputs:
        """input_ids, attention_mask, token types where the model has them, and where there are images theirs.

        Raises:
          ValueError: images and placeholders differ in number (the row is named), truncation would cut an image, or there are videos.
          TypeError: an unknown option.
        """
        unknown = [name for name in options if name not in CallOptions.__annotations__]
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r}{nearest(unknown[0], CallOptions.__annotations__)}")
        vision = {**self.image_inputs(_flat(images)), **self.video_inputs(videos or [])}
        texts = [text] if isinstance(text, str) else list(text)
        special = options.get("add_special_tokens", True)
        ids = [self.tokenizer(self.prepare(one), add_special_tokens=special)["input_ids"] for one in texts]
        rows = [row for row, _ in self.expand([np.array(row, np.int64) for row in ids], vision)]
        most = options.get("max_length")
        if options.get("truncation") and most is not None:
            rows = [truncate_ids(row, most, self.media_token_ids, where=f"row {i}") for i, row in enumerate(rows)]
        if not options.get("padding") and len({len(row) for row in rows}) > 1:
            raise ValueError(f"rows of {[len(row) for row in rows]} tokens make no array; pass padding=True")
        length = most if options.get("padding") == "max_length" else None
        padded = pad_rows(rows, self.tokenizer, length=length, multiple=options.get("pad_to_multiple_of"))
        return Inputs({**padded, **self.token_types(padded["input_ids"]), **vision})

    def prepare(self, text: str, videos: Iterable[tuple[int, float]] = ()) -> str:
        """A rendered text as it is tokenised, with one placeholder an image."""
        return text

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """The ids of an image's tokens."""
        return (self.image_token_id,)

    def token_types(self, input_ids: np.ndarray) -> dict[str, np.ndarray]:
        """The types of tokens, where the model reads them."""
        return {}

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
        return self.pixels([load_image(image, where=names[i] if names else f"image {i}") for i, image in enumerate(images)])

    def pixels(self, images: Sequence[Any]) -> dict[str, np.ndarray]:
        """The inputs of one image or more."""
        return {"pixel_values": np.stack(self.image_processor(list(images))["pixel_values"])}

    def video_inputs(
        self, videos: Sequence[Any], names: Sequence[str] | None = None, fps: Sequence[float] | None = None
    ) -> dict[str, np.ndarray]:
        """Nothing: there is no video.

        Raises:
          ValueError: names every video.
        """
        raise_all(f"{self.name} sees images, not videos", [names[i] if names else f"video {i}" for i in range(len(videos))])
        return {}

    def refuse_video(self, frames: int | None) -> None:
        """An error if there are frames."""
        if frames is not None:
            raise_all(f"{self.name} sees images, not videos", [f"a video of {frames} frames; give some of them as images"])

    def apply_chat_template(
        self, messages: Sequence[Any], *, tokenize: bool = False, add_generation_prompt: bool = False, **variables: Any
    ) -> Any:
        """The rendered text of one conversation (a list of texts for several), or with ``tokenize`` the inputs with its images."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        chats = [read_messages(chat, where=f"row {i}") for i, chat in enumerate(messages if several else [messages])]
        given = {key: value for key, value in variables.items() if key not in ("return_dict", "return_tensors")}
        texts = [renderer(self.tokenizer, **given)(chat, add_generation_prompt).text for chat in chats]
        if not tokenize:
            return texts if several else texts[0]
        images = [image for chat in chats for image in media_of(chat, "image")]
        return self(images or None, texts, add_special_tokens=False, padding=True)

    def decode(self, *args: Any, **options: Any) -> str:
        """The tokenizer's ``decode``."""
        return self.tokenizer.decode(*args, **options)

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        """The tokenizer's ``batch_decode``."""
        return self.tokenizer.batch_decode(*args, **options)


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


def _flat(images: Any) -> list[Any]:
    """Images of all rows in order: one image, a list, or a list a row."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [image for row in images for image in (row if isinstance(row, list | tuple) else [row])]
