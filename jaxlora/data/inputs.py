"""A micro-batch with Hugging Face's names, taken apart into rows without padding, each with its positions, segments and images."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlora.data.patches import cut_images
from jaxlora.data.positions import Grid, VisionRun, VisionValues, find_runs, mrope_positions
from jaxlora.data.tiles import cut_tiles, refuse_other_masks
from jaxlora.errors import nearest, raise_all
from jaxlora.typing import Int

IGNORE = -100
Inputs = Mapping[str, Any]

INPUT_NAMES = (
    "input_ids attention_mask labels position_ids segment_lengths pixel_values image_grid_thw "
    "pixel_values_videos video_grid_thw second_per_grid_ts image_sizes mm_token_type_ids token_type_ids "
    "aspect_ratio_ids aspect_ratio_mask cross_attention_mask"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelValues:
    """What the data pipeline must know of a model. ``vocab_size`` None: token ids are not checked.

    ``head_size`` is the number of tokens that can be predicted, where that is less.
    """

    pad_token_id: int
    vocab_size: int | None = None
    head_size: int | None = None
    vision: VisionValues | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row without its padding."""

    start: int  # the column of its first token in the inputs
    ids: np.ndarray  # [n]
    labels: np.ndarray  # [n], not shifted
    positions: np.ndarray  # [n] or [3, n]
    lengths: tuple[int, ...]  # of its segments
    runs: tuple[VisionRun, ...] = ()
    patches: tuple[np.ndarray, ...] = ()  # one array [t·h·w, E] a run
    ratios: tuple[int, ...] = ()  # the aspect ratio's id of each run, where images are cut into tiles
    unused_images: int = 0  # places for images that the row has beside its own, where they matter
    patch_count: int = 0  # of its images and unused places


def split_rows(inputs: Inputs, values: ModelValues) -> list[Row]:
    """Takes a micro-batch apart into rows without padding, each with its positions, segments and images.

    Raises:
      ValueError: unknown input, mask with a hole, segments that do not add up, images that do not match their placeholders.
    """
    unknown = [f"{name!r}{nearest(name, INPUT_NAMES)}" for name in inputs if name not in INPUT_NAMES]
    raise_all("inputs that no model here takes", unknown)
    vision = values.vision
    tiled = vision is not None and vision.tiles is not None and inputs.get("pixel_values") is not None
    inputs = cut_tiles(inputs, vision) if vision is not None and tiled else cut_images(inputs, vision)
    ids = np.asarray(inputs["input_ids"])
    images, videos = _VisionQueue(inputs, values, "image"), _VisionQueue(inputs, values, "video")
    rows = []
    for b, (start, length) in enumerate(token_spans(ids, inputs.get("attention_mask"))):
        kept = slice(start, start + length)
        labels = np.full(length, IGNORE) if inputs.get("labels") is None else np.asarray(inputs["labels"])[b, kept]
        try:
            runs = find_runs(ids[b, kept], images.grids(), videos.grids(), values.vision) if values.vision else []
            lengths = _segments_of(inputs.get("segment_lengths"), b, length)
            positions = _positions_of(inputs.get("position_ids"), b, kept, lengths, runs, values)
            ratios = images.ratios[images.taken : images.taken + len(runs)]
            if values.vision is not None:
                refuse_other_masks(inputs.get("cross_attention_mask"), b, kept, ids[b, kept], ratios, values.vision)
        except ValueError as error:
            raise ValueError(f"row {b}: {error}") from error
        patches = tuple((videos if run.video else images).take() for run in runs)
        unused = inputs.get("image_places", 0) - len(runs) if values.vision is not None and values.vision.unseen == "hf5" else 0
        count = sum(map(len, patches)) + unused * (math.prod(values.vision.grid) if values.vision and values.vision.grid else 0)
        rows.append(
            Row(
                start=start,
                ids=ids[b, kept],
                labels=labels,
                positions=positions,
                lengths=lengths,
                runs=tuple(runs),
                patches=patches,
                ratios=ratios,
                unused_images=unused,
                patch_count=count,
            )
        )
    raise_all("images that no placeholder in any row asks for", images.left() + videos.left())
    return rows


def token_spans(ids: Int[np.ndarray, "B S"], attention_mask: Any = None) -> list[tuple[int, int]]:
    """(first column, length) of the tokens of each row; padding may be on either side.

    >>> token_spans(np.zeros((2, 3), int), np.array([[0, 1, 1], [1, 0, 0]]))
    [(1, 2), (0, 1)]

    Raises:
      ValueError: a row whose mask has a hole.
    """
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {mask.shape}, input_ids {ids.shape}")
    spans = [(int(row.argmax()), int(row.sum())) for row in mask]
    holes = [f"row {b}" for b, (start, length) in enumerate(spans) if not mask[b, start : start + length].all()]
    raise_all("attention_mask is not one run of ones; was it given for packed rows, which use segment_lengths?", holes)
    return spans


class _VisionQueue:
    """The images (or videos) of a micro-batch, handed out in order."""

    def __init__(self, inputs: Inputs, values: ModelValues, kind: str):
        pixels, grid = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
        self.kind, self.at_grid, self.at_patch, self.taken = kind, 0, 0, 0
        self.table: list[Grid] = [(int(t), int(h), int(w)) for t, h, w in np.asarray(_or_empty(inputs.get(grid), 3))]
        if kind == "video" and values.vision and values.vision.frames_apart:
            self.table = [(1, h, w) for t, h, w in self.table for _ in range(t)]
        self.pixels = np.asarray(_or_empty(inputs.get(pixels), values.vision.patch_elements if values.vision else 0))
        seconds = _or_empty(inputs.get("second_per_grid_ts") if kind == "video" else None, 0).ravel().tolist()
        if seconds and len(seconds) != len(self.table):
            raise ValueError(f"second_per_grid_ts has {len(seconds)} entries for {len(self.table)} videos")
        self.seconds = seconds or [1.0] * len(self.table)
        self.ratios = tuple(np.asarray(inputs.get("aspect_ratio_ids", ())).ravel().tolist()) if kind == "image" else ()
        if self.table and values.vision is None:
            raise ValueError(f"{len(self.table)} {kind}s were given to a model without vision")
        expected = sum(t * h * w for t, h, w in self.table)
        elements = values.vision.patch_elements if values.vision else 0
        if self.pixels.shape != (expected, elements):
            raise ValueError(f"{pixels} has shape {self.pixels.shape}, but {grid} {self.table} says ({expected}, {elements})")

    def grids(self) -> Iterator[tuple[Grid, float]]:
        while self.at_grid < len(self.table):
            self.at_grid += 1
            yield self.table[self.at_grid - 1], self.seconds[self.at_grid - 1]

    def take(self) -> np.ndarray:
        """The patches of the next image whose grid was handed out."""
        t, h, w = self.table[self.taken]
        start, self.at_patch = self.at_patch, self.at_patch + t * h * w
        self.taken += 1
        return self.pixels[start : self.at_patch]

    def left(self) -> list[str]:
        return [f"{self.kind} {i} of grid {grid}" for i, grid in enumerate(self.table) if i >= self.at_grid]


def _or_empty(array: Any, width: int) -> np.ndarray:
    return np.zeros((0, width), np.float32) if array is None else np.asarray(array)


def _segments_of(given: Any, b: int, length: int) -> tuple[int, ...]:
    if given is None:
        return (length,) if length else ()
    lengths = tuple(int(n) for n in given[b] if n)
    if sum(lengths) != length or min(lengths, default=0) < 0:
        raise ValueError(f"segment_lengths {lengths} add up to {sum(lengths)}, but the row has {length} tokens")
    return lengths


def _positions_of(given: Any, b: int, kept: slice, lengths: tuple[int, ...], runs: Sequence[VisionRun], values: ModelValues) -> np.ndarray:
    mrope = values.vision is not None and values.vision.mrope
    if given is not None:
        positions = np.asarray(given)[..., b, kept]
        if positions.ndim == 2 and not mrope:
            raise ValueError(f"position_ids have {len(positions)} rows, but this model's positions have one")
        return np.broadcast_to(positions, (3, positions.shape[-1])) if mrope else positions
    pieces, at = [], 0
    for length in lengths:
        inside = [dataclasses.replace(run, start=run.start - at) for run in runs if at <= run.start < at + length]
        if any(run.places[-1] >= length for run in inside):
            raise ValueError(f"an image crosses the end of the segment of {length} tokens that starts at token {at}")
        pieces.append(mrope_positions(length, inside, values.vision) if mrope and values.vision else np.arange(length))
        at += length
    return np.concatenate(pieces, axis=-1) if pieces else np.zeros((3, 0) if mrope else (0,), np.int32)
