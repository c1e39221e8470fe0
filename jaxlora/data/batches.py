"""The one record that a training step sees, made in numpy from inputs with Hugging Face's names."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlora.data.ladder import Shape
from jaxlora.data.patches import cut_images
from jaxlora.data.positions import (
    Grid,
    VisionRun,
    VisionValues,
    find_runs,
    mrope_positions,
    patch_positions,
    position_taps,
    window_order,
    window_room,
)
from jaxlora.data.tiles import cut_tiles, empty_tiles, refuse_other_masks, write_tiles
from jaxlora.errors import nearest, raise_all
from jaxlora.typing import Int

IGNORE = -100
Inputs = Mapping[str, Any]
# Any, not np.ndarray: once registered as a pytree, jax rebuilds the record with tracers, shapes and shardings in these fields.
type Leaf = Any

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
    frame: int | None = None,
) -> Batch:
    """Lays micro-batches of ``rows`` rows or fewer out in the static sizes of ``shape``.

    Each is a mapping with Hugging Face's names (numpy): input_ids [b, s], padded on either side; attention_mask, labels (not
    shifted), position_ids, segment_lengths [b, M] of packed rows, pixel_values with image_grid_thw or image_sizes,
    pixel_values_videos with video_grid_thw. Labels are shifted inside each segment, positions restart in each segment. ``images`` is
    the number of vision segments (frames) a shard has room for. Where every frame of the step has ``frame`` patches, there is room for as
    many as fill the shape's, and their starts go without saying. Missing rows, and missing micro-batches up to ``accumulate``, are empty.

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
    room = None if frame is None else _room_for_frames(frame, shape.patches, parsed_batches)
    batch = _empty(count, values, shape, (rows, segments, images if room is None else room, shards), needed)
    if room is not None:
        batch = dataclasses.replace(batch, patch_segment_starts=None)
    for g, parsed in enumerate(parsed_batches):
        _refuse_what_does_not_fit(parsed, batch, f"micro-batch {g}")
        for p in range(shards):
            _write_shard(batch, g, p, range(p * per_shard, min((p + 1) * per_shard, len(parsed))), parsed, values)
    return batch


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
