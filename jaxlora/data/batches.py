"""The one record that a training step sees, made in numpy from inputs with Hugging Face's names."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlora.data.inputs import IGNORE, Inputs, ModelValues, Row, split_rows
from jaxlora.data.ladder import Shape
from jaxlora.data.positions import (
    patch_positions,
    position_taps,
    window_order,
    window_room,
)
from jaxlora.data.tiles import empty_tiles, write_tiles
from jaxlora.errors import raise_all

# Any, not np.ndarray: once registered as a pytree, jax rebuilds the record with tracers, shapes and shardings in these fields.
type Leaf = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One optimizer step: G micro-batches of B rows of S tokens, in M segments a row, and per data shard P up to W patches in N segments.

    Rows start at column 0; what follows a row's last token is padding: pad id, label -100, position 0, in no segment. The vision
    fields are None where the step has no room for patches, or where the model has no use for them. Row b belongs to shard b // (B / P).
    """

    input_ids: Leaf  # i32 [G, B, S]
    labels: Leaf  # i32 [G, B, S], shifted: what follows token t, or -100 where nothing is trained
    position_ids: Leaf  # i32 [G, B, S], or [G, 3, B, S] for M-RoPE
    segment_starts: Leaf  # i32 [G, B, M]; unused segments have length 0 and start 0
    segment_lengths: Leaf  # i32 [G, B, M]
    vision_index: Leaf = None  # i32 [G, B, S]: row of the shard's merged features that replaces this token, or -1
    patches: Leaf = None  # f32 [G, P, W, E]
    patch_positions: Leaf = None  # i32 [G, P, W, 2]: (row, column)
    patch_segment_starts: Leaf = None  # i32 [G, P, N], in patches: one segment a frame; None where each has room for W / N and fills it
    patch_segment_lengths: Leaf = None  # i32 [G, P, N]
    patch_window_starts: Leaf = None  # i32 [G, P, K], in patches: one segment a window, where the tower attends in windows
    patch_window_lengths: Leaf = None  # i32 [G, P, K]
    patch_taps: Leaf = None  # i32 [G, P, W, 4]: rows of the tower's learned positions, where it has them
    patch_tap_weights: Leaf = None  # f32 [G, P, W, 4]
    aspect_ratio_ids: Leaf = None  # i32 [G, P, N] of images that are cut into T tiles of W / (N · T) patches; 0: no image
    tile_order: Leaf = None  # i32 [G, P, N · T]: the order of a shard's tiles in which tokens see them
    seen_starts: Leaf = None  # i32 [G, B, S]: the first vision token that this token attends to
    seen_lengths: Leaf = None  # i32 [G, B, S]: and how many; negative: it attends, but as a token that sees no image


def labelled_tokens(batch: Batch) -> int:
    """The tokens that a step is trained on: the normaliser of its loss."""
    return int((np.asarray(batch.labels) != IGNORE).sum())


def saw_images(batch: Batch) -> bool:
    """Whether an image takes part in the step."""
    if batch.vision_index is not None:
        return bool((np.asarray(batch.vision_index) >= 0).any())
    return batch.seen_lengths is not None and bool((np.asarray(batch.seen_lengths) > 0).any())


def make_batch(
    micro_batches: Sequence[Inputs],
    values: ModelValues,
    shape: Shape,
    *,
    rows: int,
    segments: int = 1,
    images: int = 0,
    shards: int = 1,
    accumulate: int | None = None,
) -> Batch:
    """Lays micro-batches of ``rows`` rows or fewer out in the static sizes of ``shape``.

    Each is a mapping with Hugging Face's names (numpy): input_ids [b, s], padded on either side; attention_mask, labels (not
    shifted), position_ids, segment_lengths [b, M] of packed rows, pixel_values with image_grid_thw or image_sizes,
    pixel_values_videos with video_grid_thw. Labels are shifted inside each segment, positions restart in each segment. ``images`` is
    the number of vision segments (frames) a shard has room for. Where every frame of the step is the shape's, there is room for as many
    as fill its patches, and their starts go without saying. Missing rows, and missing micro-batches up to ``accumulate``, are empty.

    >>> ids = np.array([[5, 6, 7]])
    >>> batch = make_batch([{"input_ids": ids, "labels": ids}], ModelValues(pad_token_id=0), Shape(4), rows=1)
    >>> batch.labels.tolist(), batch.segment_lengths.tolist()
    ([[[6, 7, -100, -100]]], [[[3]]])

    Raises:
      ValueError: a row or its images do not fit, features and placeholders do not match (the row is named), an unknown input.
    """
    _refuse_unknown_ids(micro_batches, values)
    count = len(micro_batches) if accumulate is None else accumulate
    if len(micro_batches) > count or rows % shards:
        raise ValueError(f"{len(micro_batches)} micro-batches of {rows} rows do not fit {count} micro-batches on {shards} data shards")
    parsed_batches, per_shard = [split_rows(inputs, values) for inputs in micro_batches], rows // shards
    needed = max(
        (_windows(parsed[at : at + per_shard], values) for parsed in parsed_batches for at in range(0, rows, per_shard)), default=0
    )
    room = None if shape.frame is None else _room_for_frames(shape.frame, shape.patches, parsed_batches)
    batch = _empty(count, values, shape, (rows, segments, images if room is None else room, shards), needed)
    if room is not None:
        batch = dataclasses.replace(batch, patch_segment_starts=None)
    for g, parsed in enumerate(parsed_batches):
        _refuse_what_does_not_fit(parsed, batch, f"micro-batch {g}")
        for p in range(shards):
            _write_shard(batch, g, p, range(p * per_shard, min((p + 1) * per_shard, len(parsed))), parsed, values)
    return batch


def _room_for_frames(frame: int, patches: int, parsed_batches: Sequence[Sequence[Row]]) -> int | None:
    """How many frames of that size fill the patches; None where they do not, or an image or a frame of a video has another size."""
    alike = all(run.grid[1] * run.grid[2] == frame for parsed in parsed_batches for row in parsed for run in row.runs)
    return patches // frame if alike and patches % frame == 0 else None


def _windows(rows: Sequence[Row], values: ModelValues) -> int:
    """Attention windows of the rows' images."""
    return sum(len(window_order(run.grid, values.vision)[1]) for row in rows for run in row.runs if values.vision)


def _empty(count: int, values: ModelValues, shape: Shape, sizes: tuple[int, int, int, int], windows: int) -> Batch:
    rows, segments, images, shards = sizes
    tokens = (count, rows, shape.tokens)
    mrope = values.vision is not None and values.vision.mrope
    vision = {}
    if values.vision is not None and values.vision.tiles and shape.patches:
        vision = empty_tiles(tokens, (count, shards, shape.patches), values.vision)
    elif values.vision is not None and shape.patches:
        vision = {
            "vision_index": np.full(tokens, -1, np.int32),
            "patches": np.zeros((count, shards, shape.patches, values.vision.patch_elements), np.float32),
            "patch_positions": np.zeros((count, shards, shape.patches, 2), np.int32),
            "patch_segment_starts": np.zeros((count, shards, images), np.int32),
            "patch_segment_lengths": np.zeros((count, shards, images), np.int32),
        }
        if values.vision.window:
            room = (count, shards, window_room(windows, shape.patches, images, values.vision))
            vision |= {"patch_window_starts": np.zeros(room, np.int32), "patch_window_lengths": np.zeros(room, np.int32)}
        if values.vision.position_side:
            taps = (count, shards, shape.patches, 4)
            vision |= {"patch_taps": np.zeros(taps, np.int32), "patch_tap_weights": np.zeros(taps, np.float32)}
    return Batch(
        input_ids=np.full(tokens, values.pad_token_id, np.int32),
        labels=np.full(tokens, IGNORE, np.int32),
        position_ids=np.zeros((count, 3, rows, shape.tokens) if mrope else tokens, np.int32),
        segment_starts=np.zeros((count, rows, segments), np.int32),
        segment_lengths=np.zeros((count, rows, segments), np.int32),
        **vision,
    )


def _refuse_unknown_ids(micro_batches: Sequence[Inputs], values: ModelValues) -> None:
    for name, most in (("input_ids", values.vocab_size), ("labels", values.head_size or values.vocab_size)):
        for inputs in micro_batches:
            ids = np.asarray(inputs.get(name, 0))
            if most is not None and ids.size and ids.max() >= most:
                raise ValueError(
                    f"{name} hold token {ids.max()}, but the model's vocabulary has {most}; is this the model's own tokenizer, were tokens "
                    "added to it, and are the labels of image tokens -100?"
                )


def _refuse_what_does_not_fit(parsed: Sequence[Row], batch: Batch, where: str) -> None:
    _, rows, tokens = batch.input_ids.shape
    segments = batch.segment_lengths.shape[-1]
    _, shards, patches, _ = batch.patches.shape if batch.patches is not None else (0, 1, 0, 0)
    frames = batch.patch_segment_lengths.shape[-1] if batch.patch_segment_lengths is not None else patches
    faults = [f"{len(parsed)} rows, room for {rows}"] if len(parsed) > rows else []
    faults += [f"row {b} has {len(row.ids)} tokens, room for {tokens}" for b, row in enumerate(parsed) if len(row.ids) > tokens]
    faults += [
        f"row {b} has {len(row.lengths)} segments, room for {segments}" for b, row in enumerate(parsed) if len(row.lengths) > segments
    ]
    for p in range(shards):
        of_shard = list(enumerate(parsed))[p * rows // shards : (p + 1) * rows // shards]
        needed = sum(row.patch_count for _, row in of_shard)
        needed_frames = sum(run.grid[0] for _, row in of_shard for run in row.runs)
        if needed > patches or (needed and needed_frames > frames):
            with_images = [b for b, row in of_shard if row.runs]
            faults.append(
                f"rows {with_images} have {needed} patches in {needed_frames} frames, room for {patches} in {frames} on data shard {p}"
            )
    raise_all(f"{where} does not fit its shape (nothing is ever cut; choose a larger shape or a shorter row)", faults)


def _write_shard(batch: Batch, g: int, p: int, of_shard: range, parsed: Sequence[Row], values: ModelValues) -> None:
    at_patch = at_feature = at_frame = at_window = at_image = 0
    for b in of_shard:
        row = parsed[b]
        _write_row(batch, g, b, row)
        if batch.tile_order is not None and values.vision is not None:
            at_image += write_tiles(batch, (g, p, b), row, at_image, values.vision)
            continue
        for run, patches in zip(row.runs, row.patches, strict=True):
            assert values.vision is not None
            order, windows = window_order(run.grid, values.vision)
            here, merge = slice(at_patch, at_patch + len(patches)), values.vision.merge_size
            # A feature's patches move together; where it went is its row among the features.
            batch.vision_index[g, b, run.places] = at_feature + np.argsort(order)
            batch.patches[g, p, here] = _moved(patches, order)
            batch.patch_positions[g, p, here] = _moved(patch_positions(run.grid, merge), order)
            frames, area = run.grid[0], run.grid[1] * run.grid[2]
            if batch.patch_segment_starts is not None:
                batch.patch_segment_starts[g, p, at_frame : at_frame + frames] = at_patch + area * np.arange(frames)
            batch.patch_segment_lengths[g, p, at_frame : at_frame + frames] = area
            if windows:
                batch.patch_window_starts[g, p, at_window : at_window + len(windows)] = at_patch + np.cumsum([0, *windows[:-1]])
                batch.patch_window_lengths[g, p, at_window : at_window + len(windows)] = windows
            if values.vision.position_side:
                batch.patch_taps[g, p, here], batch.patch_tap_weights[g, p, here] = position_taps(run.grid, values.vision)
            at_patch, at_feature, at_frame = at_patch + len(patches), at_feature + run.features, at_frame + frames
            at_window += len(windows)


def _moved(patches: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Patches [W, …] whose groups of W / F, one a feature, are taken in ``order`` [F]."""
    return patches.reshape(len(order), -1, *patches.shape[1:])[order].reshape(patches.shape)


def _write_row(batch: Batch, g: int, b: int, row: Row) -> None:
    n, m = len(row.ids), len(row.lengths)
    starts = np.cumsum([0, *row.lengths])
    shifted = np.append(row.labels[1:], IGNORE)[:n]
    # The label after a document's last token belongs to the next document.
    shifted[starts[1:] - 1] = IGNORE
    batch.input_ids[g, b, :n] = row.ids
    batch.labels[g, b, :n] = shifted
    batch.position_ids[g, ..., b, :n] = row.positions
    batch.segment_starts[g, b, :m] = starts[:-1]
    batch.segment_lengths[g, b, :m] = row.lengths
