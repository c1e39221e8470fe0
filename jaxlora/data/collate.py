"""What the vision collator does: rows of messages and images to one micro-batch with Hugging Face's names."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlora.data.chat import ChatOptions, Encoded, encode
from jaxlora.data.images import Resize, ResizeDimension, image_size, load_image, resize_image, resized_size
from jaxlora.data.padding import IGNORE, Inputs, pad_rows, truncate_ids
from jaxlora.data.responses import Markers, mask_to_responses
from jaxlora.data.rows import DEFAULT_FPS, Conversation, PlainText, fps_of, media_of, read_row
from jaxlora.data.tiles import stack_tiles

# Placeholders and frames of media in the vocabularies of the families we know: never a target.
MEDIA_TOKENS = (
    *"<|image|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>".split(),
    *"<image> </image> [IMG] [IMG_BREAK] [IMG_END]".split(),
    *"<image_soft_token> <start_of_image> <end_of_image> <|image> <image|> <|video|> <|START_OF_IMG|> <|END_OF_IMG|>".split(),
    *"<|IMG_LINE_BREAK|> <|IMG_PATCH|> <img> </img> <IMG_CONTEXT> <video> <|IMAGE|> <|VIDEO|> <|vision_bos|> <|vision_eos|>".split(),
    *"<|audio|> <|audio> <audio|> <audio_soft_token> <start_of_audio> <end_of_audio> <so_embedding> <so_start> <so_end>".split(),
    *"<|AUDIO|> <|audio_bos|> <|audio_eos|>".split(),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollateOptions:
    """The collator's choices; `jaxlora.api.collator` explains them."""

    max_seq_length: int | None = None
    formatting_func: Callable[[Any], Any] | None = None
    resize: Resize = None
    resize_dimension: ResizeDimension = 0
    snap: int | None = None
    ignore_index: int = IGNORE
    responses_only: bool = False
    last_response_only: bool = False
    markers: Markers | None = None
    completion_only_loss: bool = True
    pad_to_multiple_of: int | None = None
    image_root: str | pathlib.Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parsed:
    """A row before its pixels are read: one token for each image."""

    row: Conversation | PlainText
    encoded: Encoded
    images: list[Any]
    videos: list[Any]
    fps: list[float]  # of each video


def collate(rows: Sequence[Any], processor: Any, options: CollateOptions) -> Inputs:
    """One micro-batch: input_ids, attention_mask, labels, mm_token_type_ids [b, s]; pixel_values, image_grid_thw where there are images.

    Raises:
      ValueError: names the row: no messages, a broken image, images without placeholders, truncation that would cut an image.
    """
    if not rows:
        raise ValueError("no rows to collate; is the dataset empty?")
    ids, labels, vision = [], [], []
    for i, row in enumerate(rows):
        parsed = parse_row(row, processor, options, where=f"row {i}")
        vision.append(_pixels(parsed, processor, options, f"row {i}"))
        [(row_ids, source)] = processor.expand([parsed.encoded.input_ids], vision[-1], [f"row {i}"])
        ids.append(row_ids)
        labels.append(parsed.encoded.labels[source])
    if options.markers is not None:
        # Before rows are cut: a marker that is cut off is no wrong marker.
        labels = mask_to_responses(ids, labels, options.markers, last_response_only=options.last_response_only)
    ids = [_cut(row, processor, options, f"row {i}") for i, row in enumerate(ids)]
    labels = [row[: len(kept)] for row, kept in zip(labels, ids, strict=True)]
    padded = pad_rows(ids, processor.tokenizer, labels=labels, multiple=options.pad_to_multiple_of)
    padded["labels"] = np.where(padded["labels"] == IGNORE, options.ignore_index, padded["labels"])
    names = sorted({name for made in vision for name in made})
    tiled = "aspect_ratio_ids" in names
    together = stack_tiles(vision) if tiled else {name: _together([made[name] for made in vision if name in made]) for name in names}
    return Inputs({**padded, **processor.token_types(padded["input_ids"]), **together})


def _together(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One array of all rows' images; where their sizes differ, zeros follow at the bottom and on the right, as in transformers."""
    largest = np.max([array.shape[1:] for array in arrays], axis=0)
    gaps = [[(0, 0), *((0, most - side) for most, side in zip(largest, array.shape[1:], strict=True))] for array in arrays]
    return np.concatenate([np.pad(array, gap) if np.any(gap) else array for array, gap in zip(arrays, gaps, strict=True)])


def measure_row(row: Any, processor: Any, options: CollateOptions, *, where: str = "row") -> tuple[int, int, int]:
    """(tokens, patches, frames) of the row that `collate` would make, from image headers: no pixel is decoded.

    Refuses what it would refuse.
    """
    parsed = parse_row(row, processor, options, where=where)
    root = options.image_root
    sizes = [_resized(image_size(image, where=f"{where}, image {k}", image_root=root), options) for k, image in enumerate(parsed.images)]
    frames = [(image_size(video[0], where=f"{where}, video {k}", image_root=root), len(video)) for k, video in enumerate(parsed.videos)]
    images = [processor.grid_of(size) for size in sizes]
    videos = [processor.grid_of(_resized(size, options), count) for size, count in frames]
    grids = {"image_grid_thw": np.array(images).reshape(-1, 3), "video_grid_thw": np.array(videos).reshape(-1, 3)}
    [(ids, _)] = processor.expand([parsed.encoded.input_ids], grids, [where])
    made = images + videos
    return len(_cut(ids, processor, options, where)), sum(t * h * w for t, h, w in made), sum(t for t, _, _ in made)


def parse_row(row: Any, processor: Any, options: CollateOptions, *, where: str) -> _Parsed:
    """Formats, reads, renders and tokenises a row; media tokens are not trained on."""
    row = row if options.formatting_func is None else options.formatting_func(row)
    read = read_row(row, where=where)
    columns: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
    media: dict[str, list[Any]] = {"image": [], "video": []}
    if isinstance(read, Conversation):
        media = {kind: media_of(read.messages, kind) for kind in media}
    for kind in media:
        given = columns.get(f"{kind}s")
        if given is not None:
            media[kind] = list(given) if isinstance(given, list | tuple) else [given]
    prompted = isinstance(read, PlainText) or read.prompt_turns > 0
    if prompted and not options.completion_only_loss:
        read = dataclasses.replace(
            read, **({"prompt": "", "text": read.prompt + read.text} if isinstance(read, PlainText) else {"prompt_turns": 0})
        )
    by_template = options.responses_only and options.markers is None
    chat_options = ChatOptions(responses_only=by_template, last_response_only=by_template and options.last_response_only)
    own = fps_of(read.messages) if isinstance(read, Conversation) else []
    # A row's own column of videos says nothing about their times.
    fps = own if len(own) == len(media["video"]) else [DEFAULT_FPS] * len(media["video"])
    videos = zip([len(frames) for frames in media["video"]], fps, strict=True)
    prepare = functools.partial(processor.prepare, videos=videos)
    encoded = encode(read, processor.tokenizer, chat_options, where=where, prepare=prepare)
    trained = np.where(np.isin(encoded.input_ids, media_ids(processor.tokenizer)), IGNORE, encoded.labels)
    return _Parsed(row=read, encoded=dataclasses.replace(encoded, labels=trained), images=media["image"], videos=media["video"], fps=fps)


def media_ids(tokenizer: Any) -> list[int]:
    """The ids of `MEDIA_TOKENS` that the vocabulary has."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary[token] for token in MEDIA_TOKENS if token in vocabulary and vocabulary[token] != tokenizer.unk_token_id)


def _resized(size: tuple[int, int], options: CollateOptions) -> tuple[int, int]:
    return resized_size(size, options.resize, dimension=options.resize_dimension, multiple=options.snap)


def _pixels(parsed: _Parsed, processor: Any, options: CollateOptions, where: str) -> dict[str, np.ndarray]:
    def read(source: Any, name: str) -> Any:
        image = load_image(source, where=name, image_root=options.image_root)
        return resize_image(image, options.resize, dimension=options.resize_dimension, multiple=options.snap)

    images = [read(image, f"{where}, image {k}") for k, image in enumerate(parsed.images)]
    videos = [[read(frame, f"{where}, video {k}") for frame in frames] for k, frames in enumerate(parsed.videos)]
    return {
        **processor.image_inputs(images, [f"{where}, image {k}" for k in range(len(images))]),
        **processor.video_inputs(videos, [f"{where}, video {k}" for k in range(len(videos))], parsed.fps),
    }


def _cut(ids: np.ndarray, processor: Any, options: CollateOptions, where: str) -> np.ndarray:
    most = options.max_seq_length
    return ids if most is None else truncate_ids(ids, most, processor.media_token_ids, where=where)
