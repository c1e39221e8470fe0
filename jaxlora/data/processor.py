"""What all processors share: calls with text, chats, decoding, files."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from conversion.atomic import files_into
from jaxlora.data.images import load_image
from jaxlora.data.padding import pad_rows, truncate_ids
from jaxlora.data.rows import read_messages
from jaxlora.data.turns import renderer
from jaxlora.errors import nearest, raise_all


class CallOptions(TypedDict, total=False):
    """What a processor's call takes besides text and images, as in transformers; arrays are always numpy's."""

    padding: bool | str
    truncation: bool
    max_length: int | None
    add_special_tokens: bool
    pad_to_multiple_of: int | None
    return_tensors: str | None


class Processor:
    """A processor without torch: a tokenizer, an image processor, and what a subclass knows of how they meet.

    ``name`` is the family's. A subclass is called with images and text, and has ``grid_of``, ``measure``, ``expand`` and ``image_inputs``
    for batches.
    """

    name: str

    def __init__(self, image_processor: Any, tokenizer: Any):
        self.image_processor, self.tokenizer = image_processor, tokenizer

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's chat template."""
        return self.tokenizer.chat_template

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """The ids of images' tokens, which truncation must not cut."""
        raise NotImplementedError

    def prepare(self, text: str, videos: Iterable[tuple[int, float]] = ()) -> str:
        """A rendered text as it is tokenised, with one placeholder an image; ``videos`` are (frames, frames a second)."""
        return text

    def token_types(self, input_ids: np.ndarray) -> dict[str, np.ndarray]:
        """The types of tokens, where the model reads them."""
        return {}

    def video_inputs(
        self, videos: Sequence[Any], names: Sequence[str] | None = None, fps: Sequence[float] | None = None
    ) -> dict[str, np.ndarray]:
        """Nothing: there is no video, unless a subclass says otherwise.

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
        if tokenize:
            return self.inputs_of_chats(chats, texts)
        return texts if several else texts[0]

    def inputs_of_chats(self, chats: Sequence[Any], texts: Sequence[str]) -> Any:
        """The inputs of rendered conversations, with their images."""
        raise NotImplementedError

    def decode(self, *args: Any, **options: Any) -> str:
        """The tokenizer's ``decode``."""
        return self.tokenizer.decode(*args, **options)

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        """The tokenizer's ``batch_decode``."""
        return self.tokenizer.batch_decode(*args, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the files that transformers' own processor reads; each replaces an older one only when all are written."""
        with files_into(folder) as new:
            self.write(new)

    def write(self, folder: Path) -> None:
        """Writes the files into a folder that is not yet in its place."""
        raise NotImplementedError

    def padded(self, rows: list[np.ndarray], options: CallOptions) -> dict[str, Any]:
        """input_ids and attention_mask of rows that are truncated and padded as asked.

        Raises:
          ValueError: truncation would cut an image, or rows of several lengths without padding.
        """
        most = options.get("max_length")
        if options.get("truncation") and most is not None:
            rows = [truncate_ids(row, most, self.media_token_ids, where=f"row {i}") for i, row in enumerate(rows)]
        if not options.get("padding") and len({len(row) for row in rows}) > 1:
            raise ValueError(f"rows of {[len(row) for row in rows]} tokens make no array; pass padding=True")
        length = most if options.get("padding") == "max_length" else None
        return pad_rows(rows, self.tokenizer, length=length, multiple=options.get("pad_to_multiple_of"))


def check_options(options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises for an option that nobody knows.

    Raises:
      TypeError: names the nearest known one.
    """
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}{nearest(unknown[0], known)}")


def load_images(images: Sequence[Any], names: Sequence[str] | None) -> list[Any]:
    """Opened images; errors carry the image's name."""
    return [load_image(image, where=names[i] if names else f"image {i}") for i, image in enumerate(images)]


def flat(images: Any) -> list[Any]:
    """Images of all rows in order: one image, a list, or a list a row."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [image for row in images for image in (row if isinstance(row, list | tuple) else [row])]
