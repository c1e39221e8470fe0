"""Where vision features sit in a row of tokens, and the position ids that follow from it (numpy only).

A grid is (t, h, w) in patches, as in Hugging Face's ``image_grid_thw``; merging m x m patches leaves t·h·w / m² features,
one for each placeholder token.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from jaxlora.typing import Float, Int

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
    grid: Grid | None = None  # of every image, where the model takes one size only and pixel_values are [N, C, H, W]
    tiles: tuple[int, ...] | None = None  # of an image, by its aspect ratio's id, where text attends to tiles instead of holding features
    unseen: Literal["reference", "hf5"] = "reference"  # what a token that sees no tile attends to: nothing, or all tiles of its row
    mrope: bool = False
    tokens_per_second: float | None = None  # None: a video's frames are one position apart, whatever their time
    mrope_advance: Literal["reference", "hf5"] = "reference"
    window: int | None = None  # side of an attention window in merged cells, where some blocks of the tower attend in windows
    position_side: int | None = None  # side of the tower's square table of learned positions
    frames_apart: bool = False  # every frame of a video has placeholders of its own
    row_breaks: bool = False  # after each row of an image's features comes a token that is none; images may have any size


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionRun:
    """One image or video in a row. Its placeholders follow each other from token ``start`` on, but for one token after each ``broken``."""

    start: int
    grid: Grid
    features: int
    video: bool = False
    seconds_per_grid: float = 1.0
    broken: int | None = None

    @property
    def places(self) -> Int[np.ndarray, " F"]:
        """The tokens of its features.

        >>> VisionRun(start=3, grid=(1, 2, 2), features=4, broken=2).places.tolist()
        [3, 4, 6, 7]
        """
        at = np.arange(self.features)
        return self.start + at + (0 if self.broken is None else at // self.broken)


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
        features = 1 if values.tiles else grid[0] * grid[1] * grid[2] // values.merge_size**2
        broken = grid[2] // values.merge_size if values.row_breaks else None
        run = VisionRun(start=at_placeholder, grid=grid, features=features, video=video, seconds_per_grid=seconds, broken=broken)
        at = int(run.places[-1]) + 1
        same = ids[at_placeholder:at] == ids[at_placeholder]
        present = int(same.sum())
        if at > len(ids) or present != features or not same[run.places - at_placeholder].all():
            raise ValueError(
                f"the {kind} at token {at_placeholder} has {features} features (grid {grid}, merge {values.merge_size}) "
                f"but {present} placeholders; was the row truncated, or resized after it was tokenised?"
            )
        runs.append(run)
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


def window_order(grid: Grid, values: VisionValues) -> tuple[Int[np.ndarray, " F"], list[int]]:
    """(features in window order, patches of each window) of one grid.

    Every frame is cut into squares of ``window`` x ``window`` merged cells from its top left corner, so that those at the right and the
    bottom may be smaller; windows, and the cells inside each, are in row-major order. Patches in that order make windows contiguous, and
    frames stay contiguous too (Qwen2.5-VL, as ``get_vision_window_index`` in transformers).

    >>> values = VisionValues(image_token_id=9, patch_size=14, merge_size=2, patch_elements=1176, window=2)
    >>> order, lengths = window_order((1, 4, 6), values)
    >>> order.tolist(), lengths
    ([0, 1, 3, 4, 2, 5], [16, 8])
    """
    t, h, w = grid[0], grid[1] // values.merge_size, grid[2] // values.merge_size
    cells = np.arange(t * h * w).reshape(t, h, w)
    if values.window is None:
        return cells.ravel(), []
    side = values.window
    windows = [frame[i : i + side, j : j + side].ravel() for frame in cells for i in range(0, h, side) for j in range(0, w, side)]
    return np.concatenate(windows), [values.merge_size**2 * len(window) for window in windows]


def window_room(needed: int, patches: int, frames: int, values: VisionValues) -> int:
    """Windows to have room for, where ``patches`` patches in at most ``frames`` frames need that many: one of two sizes.

    Twice as many as full windows, and one a frame, hold what photographs need. Frames a cell wide have the most windows for their area: a
    frame of a x b cells has ceil(a / s) · ceil(b / s) of them, at most (a·b + s - 1) / s. Two sizes are two compiled programs at most.

    >>> values = VisionValues(image_token_id=9, patch_size=14, merge_size=2, patch_elements=1176, window=4)
    >>> window_room(17, 1024, 1, values), window_room(40, 1024, 1, values)
    (33, 64)
    """
    side, cells = values.window or 1, patches // values.merge_size**2
    usual, most = 2 * cells // side**2 + frames, (cells + (side - 1) * frames) // side
    return min(usual, most) if needed <= usual else most


def position_taps(grid: Grid, values: VisionValues) -> tuple[Int[np.ndarray, "W 4"], Float[np.ndarray, "W 4"]]:
    """(rows, weights) of the learned positions whose weighted sum is that of each patch, in merge-block order (Qwen3-VL).

    The table's side x side positions are interpolated bilinearly, its corners at the corners of the frame: patch i of n lies at
    i (side - 1) / (n - 1).

    >>> values = VisionValues(image_token_id=9, patch_size=14, merge_size=2, patch_elements=1176, position_side=4)
    >>> rows, weights = position_taps((1, 4, 6), values)
    >>> rows[5].tolist(), weights[5].round(2).tolist()
    ([1, 2, 5, 6], [0.20000000298023224, 0.800000011920929, 0.0, 0.0])
    """
    assert values.position_side is not None
    side = values.position_side
    # [W, 2] of (row, column), each between two rows or columns of the table.
    at = patch_positions(grid, values.merge_size) * ((side - 1) / np.maximum(np.array(grid[1:]) - 1, 1)).astype(np.float32)[None]
    low = np.floor(at).astype(np.int32)
    high, part = np.minimum(low + 1, side - 1), (at - low).astype(np.float32)
    pairs = [(a, b) for a in (0, 1) for b in (0, 1)]
    rows = np.stack([(low, high)[a][:, 0] * side + (low, high)[b][:, 1] for a, b in pairs], axis=-1)
    weights = np.stack([(1 - part, part)[a][:, 0] * (1 - part, part)[b][:, 1] for a, b in pairs], axis=-1)
    return rows.astype(np.int32), weights.astype(np.float32)
