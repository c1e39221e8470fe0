"""Llama 3.2 Vision's processor: text and images to the model's inputs, without torch."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from conversion.atomic import files_into
from jaxlora.data.images import load_image
from jaxlora.data.padding import Inputs, pad_rows, truncate_ids
from jaxlora.data.positions import Grid
from jaxlora.data.processor_files import load_tokenizer, read_config, write_json
from jaxlora.data.rows import media_of, read_messages
from jaxlora.data.tiles import cross_attention_mask, stack_tiles
from jaxlora.data.turns import renderer
from jaxlora.errors import nearest, raise_all

_IMAGE_KEYS = (
    "do_resize resample size do_rescale rescale_factor do_normalize image_mean image_std do_convert_rgb do_pad max_image_tiles"
).split()
# Of every released model; a folder with a config.json says so itself.
_PATCH_SIZE = 14


class CallOptions(TypedDict, total=False):
    """What `MllamaProcessor.__call__` takes besides text and images, as in transformers; arrays are always numpy's."""

    padding: bool | str
    truncation: bool
    max_length: int | None
    add_special_tokens: bool
    pad_to_multiple_of: int | None
    return_tensors: str | None


class MllamaProcessor:
    """The processor of Llama 3.2 Vision: an image is one token ``<|image|>``, and up to 4 tiles of pixels that text attends to.

    ``pixel_values`` are [rows, images, tiles, channels, height, width], with ``aspect_ratio_ids`` [rows, images] (0: no image),
    ``aspect_ratio_mask`` [rows, images, tiles] and, in a call with text, ``cross_attention_mask`` [rows, tokens, images, tiles].
    """

    def __init__(self, image_processor: MllamaImageProcessorPil, tokenizer: Any, patch_size: int = _PATCH_SIZE):
        self.image_processor, self.tokenizer, self.patch_size = image_processor, tokenizer, patch_size
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

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the files that transformers' own processor reads; each replaces an older one only when all are written."""
        with files_into(folder) as new:
            self.tokenizer.save_pretrained(new)
            self.image_processor.save_pretrained(new)
            config = read_config(new, "preprocessor_config.json", "")
            write_json(new / "preprocessor_config.json", {**(config or {}), "processor_class": "MllamaProcessor"})

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's chat template."""
        return self.tokenizer.chat_template

    def __call__(self, images: Any = None, text: Any = None, **options: Unpack[CallOptions]) -> Inputs:
        """input_ids and attention_mask, and where there are images what the class says: ``images`` are one, a list, or a list a text.

        A text without the token that begins texts gets it, after leading images.

        Raises:
          ValueError: images and placeholders differ in number (the row is named), or truncation would cut an image.
          TypeError: an unknown option.
        """
        unknown = [name for name in options if name not in CallOptions.__annotations__]
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r}{nearest(unknown[0], CallOptions.__annotations__)}")
        texts = [text] if isinstance(text, str) else list(text)
        special, most = options.get("add_special_tokens", True), options.get("max_length")
        rows = [np.array(self.tokenizer(self._begun(one), add_special_tokens=special)["input_ids"], np.int64) for one in texts]
        shared = _by_row(images, [int((row == self.image_token_id).sum()) for row in rows])
        vision = [self.image_inputs(own, [f"row {i}, image {k}" for k in range(len(own))]) for i, own in enumerate(shared)]
        for i, (row, own) in enumerate(zip(rows, vision, strict=True)):
            self.expand([row], own, [f"row {i}"])
        if options.get("truncation") and most is not None:
            rows = [truncate_ids(row, most, self.media_token_ids, where=f"row {i}") for i, row in enumerate(rows)]
        if not options.get("padding") and len({len(row) for row in rows}) > 1:
            raise ValueError(f"rows of {[len(row) for row in rows]} tokens make no array; pass padding=True")
        length = most if options.get("padding") == "max_length" else None
        made = pad_rows(rows, self.tokenizer, length=length, multiple=options.get("pad_to_multiple_of"))
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

    def prepare(self, text: str, videos: Iterable[tuple[int, float]] = ()) -> str:
        """The text itself: a placeholder is tokenised as it stands."""
        return text

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """The placeholder of images."""
        return (self.image_token_id,)

    def token_types(self, input_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Nothing: the model asks for no types."""
        return {}

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
        if frames is not None:
            raise_all("Llama 3.2 Vision sees images, not videos", [f"a video of {frames} frames; give some of them as images"])
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
        loaded = [load_image(image, where=names[i] if names else f"image {i}") for i, image in enumerate(images)]
        made = self.image_processor([loaded])
        return {name: np.asarray(made[name]) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}

    def video_inputs(
        self, videos: Sequence[Any], names: Sequence[str] | None = None, fps: Sequence[float] | None = None
    ) -> dict[str, np.ndarray]:
        """Nothing: there is no video.

        Raises:
          ValueError: names every video.
        """
        raise_all("Llama 3.2 Vision sees images, not videos", [names[i] if names else f"video {i}" for i in range(len(videos))])
        return {}

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
        images = [media_of(chat, "image") for chat in chats]
        return self(images if any(images) else None, texts, add_special_tokens=False, padding=True)

    def decode(self, *args: Any, **options: Any) -> str:
        """The tokenizer's ``decode``."""
        return self.tokenizer.decode(*args, **options)

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        """The tokenizer's ``batch_decode``."""
        return self.tokenizer.batch_decode(*args, **options)


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
