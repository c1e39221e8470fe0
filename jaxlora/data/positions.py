"""Where vision features sit in a row of tokens, and the position ids that follow from it (numpy only).

A grid is (t, h, w) in patches, as in Hugging Face's ``image_grid_thw``; merging m x m patches leaves t·h·w / m² features,
one for each placeholder token.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from jaxlora.typing import Int

Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionValues:
    """What the data pipeline must know of a vision-language model; read from its config by the model's own file."""

    image_token_id: int
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    patch_size: int
    merge_size: int = 1
    temporal_patch_size: int = 1
    patch_elements: int  # channels x frames x height x width of one row of pixel_values
    mrope: bool = False
    tokens_per_second: float | None = None  # None: a video's frames are one position apart, whatever their time
    mrope_advance: Literal["reference", "hf5"] = "reference"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionRun:
    """One image or video in a row: its placeholders are tokens ``start`` to ``start + features``."""

    start: int
    grid: Grid
    features: int
    video: bool = False
    seconds_per_grid: float = 1.0


def find_runs(
    ids: Int[np.ndarray, " S"],
    images: Iterator[tuple[Grid, float]],
    videos: Iterator[tuple[Grid, float]],
    values: VisionValues,
) -> list[VisionRun]:
    """Pairs the placeholders of one row with the next (grid, seconds per grid) of each kind, in order.

    ``images`` and ``videos`` are consumed, so that successive rows of a micro-batch continue where this one stopped.

    Raises:
      ValueError: a placeholder without a grid, or a grid whose features do not match the placeholders in a row.
    """
    runs, at = [], 0
    for at_placeholder in np.flatnonzero((ids == values.image_token_id) | (ids == values.video_token_id)).tolist():
        if at_placeholder < at:
            continue
        video = int(ids[at_placeholder]) == values.video_token_id
        found = next(videos if video else images, None)
        kind = "video" if video else "image"
        if found is None:
            raise ValueError(f"token {at_placeholder} is {kind} placeholder {int(ids[at_placeholder])}, but no {kind} is left for it")
        grid, seconds = found
        features = grid[0] * grid[1] * grid[2] // values.merge_size**2
        at = at_placeholder + features
        same = ids[at_placeholder:at] == ids[at_placeholder]
        if len(same) < features or not same.all():
            present = int(same.argmin()) if not same.all() else len(same)
            raise ValueError(
                f"the {kind} at token {at_placeholder} has {features} features (grid {grid}, merge {values.merge_size}) "
                f"but {present} placeholders; was the row truncated, or resized after it was tokenised?"
            )
        runs.append(VisionRun(start=at_placeholder, grid=grid, features=features, video=video, seconds_per_grid=seconds))
    return runs


def mrope_positions(length: int, runs: Sequence[VisionRun], values: VisionValues) -> Int[np.ndarray, "3 S"]:
    """Rows (time, height, width) of the positions of ``length`` tokens, whose first token has position 0.

    Text: p, p+1, … in every row. A vision run that starts at p: time p + ⌊k · interval⌋ of frame k, height p + row, width
    p + column of the merged grid. Then p goes on at the largest position so far + 1 (``mrope_advance="reference"``, the rule that
    the weights were trained with) or at p + max(h, w) / m (``"hf5"``, transformers 5, which differs for videos only).

    >>> values = VisionValues(image_token_id=9, patch_size=14, merge_size=2, patch_elements=1176, mrope=True)
    >>> mrope_positions(7, [VisionRun(start=1, grid=(1, 4, 4), features=4)], values).tolist()
    [[0, 1, 1, 1, 1, 3, 4], [0, 1, 1, 2, 2, 3, 4], [0, 1, 2, 1, 2, 3, 4]]
    """
    merge, pieces, at, p = values.merge_size, [], 0, 0
    for run in runs:
        text = p + np.arange(run.start - at)
        pieces.append(np.stack([text] * 3))
        p += run.start - at
        t, h, w = run.grid[0], run.grid[1] // merge, run.grid[2] // merge
        interval = values.tokens_per_second * run.seconds_per_grid if run.video and values.tokens_per_second is not None else 1.0
        time, row, column = np.meshgrid(np.floor(np.arange(t) * interval), np.arange(h), np.arange(w), indexing="ij")
        vision = p + np.stack([time.ravel(), row.ravel(), column.ravel()]).astype(np.int64)
        pieces.append(vision)
        p = int(vision.max()) + 1 if values.mrope_advance == "reference" else p + max(h, w)
        at = run.start + run.features
    text = p + np.arange(length - at)
    return np.concatenate([*pieces, np.stack([text] * 3)], axis=1).astype(np.int32)


def rope_delta(positions: Int[np.ndarray, "*rows S"]) -> int:
    """What to add to a token's index to continue the positions after a prompt: max + 1 - S.

    >>> rope_delta(np.array([[0, 1, 1, 2], [0, 1, 2, 3]]))
    0
    """
    return int(positions.max()) + 1 - positions.shape[-1]


def patch_positions(grid: Grid, merge: int) -> Int[np.ndarray, "W 2"]:
    """(row, column) of every patch of a grid, in merge-block order: the m x m patches of one feature are neighbours.

    >>> patch_positions((1, 2, 4), 2).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    """
    t, h, w = grid
    row, column = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    blocks = np.stack([row, column], axis=-1).reshape(h // merge, merge, w // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return np.tile(blocks.reshape(h * w, 2), (t, 1)).astype(np.int32)
