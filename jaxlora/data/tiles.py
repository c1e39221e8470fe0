"""Images cut into tiles, which text attends to without a place among its tokens (Llama 3.2 Vision; numpy only).

An image is one placeholder token. A token sees the images of the last group of adjacent placeholders before it, as far as they come
before it; it counts as before itself, and documents packed into a row do not see each other's images.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlora.data.patches import patches_of
from jaxlora.data.positions import VisionValues
from jaxlora.errors import raise_all
from jaxlora.typing import Int

type Inputs = Mapping[str, Any]
type Span = Int[np.ndarray, " S"]


def cut_tiles(inputs: Inputs, values: VisionValues) -> dict[str, Any]:
    """``pixel_values`` [b, n, T, C, H, W] as patches [N · T · h · w, E] with image_grid_thw [N, 3] and aspect_ratio_ids [N].

    A row's unused places (id 0) are left out: N are its images. ``image_places`` is n.

    Raises:
      ValueError: another shape, a row with more or fewer images than placeholders, ratios that nobody knows or that deny the mask.
    """
    assert values.grid is not None and values.tiles is not None
    (tiles, h, w), size = values.grid, values.patch_size
    pixels, ratios = (np.asarray(inputs.get(name)) for name in ("pixel_values", "aspect_ratio_ids"))
    if pixels.ndim != 6 or ratios.shape != pixels.shape[:2] or pixels.shape[2] != tiles or pixels.shape[4:] != (h * size, w * size):
        wanted = f"[rows, images, {tiles}, channels, {h * size}, {w * size}] and aspect_ratio_ids [rows, images]"
        raise ValueError(
            f"pixel_values {pixels.shape}, aspect_ratio_ids {ratios.shape}: expected {wanted}; is the processor another model's?"
        )
    if ratios.min(initial=0) < 0 or ratios.max(initial=0) >= len(values.tiles):
        raise ValueError(f"aspect_ratio_ids {ratios.tolist()}: the model knows 0 (no image) to {len(values.tiles) - 1}")
    mask = inputs.get("aspect_ratio_mask")
    if mask is not None and not np.array_equal(np.asarray(mask).sum(-1), np.take(values.tiles, ratios)):
        raise ValueError(f"aspect_ratio_mask {np.asarray(mask).tolist()} does not fit aspect_ratio_ids {ratios.tolist()}")
    ids = np.asarray(inputs["input_ids"])
    kept = ids if inputs.get("attention_mask") is None else np.where(np.asarray(inputs["attention_mask"]) > 0, ids, -1)
    wanted, given = (kept == values.image_token_id).sum(-1), (ratios > 0).sum(-1)
    raise_all(
        "images and their placeholders differ in number",
        [f"row {b}: {n} placeholders, {m} images" for b, (n, m) in enumerate(zip(wanted, given, strict=True)) if n != m],
    )
    used = pixels[ratios > 0].reshape(-1, *pixels.shape[3:])
    patches = np.concatenate([patches_of(tile, size, 1) for tile in used] or [np.zeros((0, values.patch_elements), np.float32)])
    grids = np.array([values.grid] * int(given.sum()), np.int64).reshape(-1, 3)
    return {
        **inputs,
        "pixel_values": patches,
        "image_grid_thw": grids,
        "aspect_ratio_ids": ratios[ratios > 0],
        "image_places": ratios.shape[1],
    }


def stack_tiles(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One micro-batch of rows' images [1, n, …], with as many places a row as the row with most images needs; an unused one has one tile.

    A row without an image is an empty mapping.
    """
    places = max(row["aspect_ratio_ids"].shape[1] for row in rows if row)
    shapes = next({name: array.shape[2:] for name, array in row.items()} for row in rows if row)
    stacked = {
        name: np.zeros((len(rows), places, *shape), np.float32 if name == "pixel_values" else np.int64) for name, shape in shapes.items()
    }
    stacked["aspect_ratio_mask"][..., 0] = 1
    for b, row in enumerate(rows):
        for name, array in row.items():
            stacked[name][b, : array.shape[1]] = array[0]
    return stacked


def seen_images(ids: Int[np.ndarray, " S"], image_token_id: int) -> tuple[Span, Span]:
    """(first, one past the last) of a document's images that each token sees; equal before the first image.

    >>> [span.tolist() for span in seen_images(np.array([5, 9, 6, 9, 9, 7]), 9)]
    [[0, 0, 0, 1, 1, 1], [0, 1, 1, 2, 3, 3]]
    """
    image = ids == image_token_id
    opens = image & ~np.concatenate([[False], image[:-1]])
    last = np.cumsum(image)
    return np.maximum.accumulate(np.where(opens, last - 1, 0)), last


def cross_attention_mask(rows: Sequence[np.ndarray], tiles: Sequence[Sequence[int]], image_token_id: int, most: int) -> np.ndarray:
    """[b, S, n, T]: 1 where a token sees a tile, of up to ``most`` tiles an image; ``tiles`` are those of each image of each row."""
    mask = np.zeros((len(rows), max(map(len, rows)), max(map(len, tiles)), most), np.int64)
    for b, (ids, counts) in enumerate(zip(rows, tiles, strict=True)):
        first, last = seen_images(ids, image_token_id)
        for image, count in enumerate(counts):
            mask[b, : len(ids), image, :count] = ((first <= image) & (image < last))[:, None]
    return mask


def refuse_other_masks(given: Any, b: int, kept: slice, ids: np.ndarray, ratios: Sequence[int], values: VisionValues) -> None:
    """Tokens see what ``seen_images`` says.

    Raises:
      ValueError: the row's ``cross_attention_mask`` says something else.
    """
    if given is None or not ratios or values.tiles is None or values.grid is None:
        return
    own = cross_attention_mask([ids], [[values.tiles[r] for r in ratios]], values.image_token_id, values.grid[0])[0]
    theirs = np.asarray(given)[b, kept, : len(ratios)]
    if theirs.shape != own.shape or not np.array_equal(theirs, own):
        raise ValueError("cross_attention_mask is not that of the processor (a token sees the last group of adjacent images before it)")


def empty_tiles(tokens: tuple[int, int, int], patches: tuple[int, int, int], values: VisionValues) -> dict[str, np.ndarray]:
    """A batch's fields without an image, of ``tokens`` (G, B, S) and ``patches`` (G, P, W): as many images as have room whole."""
    assert values.grid is not None
    *shards, room = patches
    places = room // math.prod(values.grid)
    return {
        "patches": np.zeros((*patches, values.patch_elements), np.float32),
        "aspect_ratio_ids": np.zeros((*shards, places), np.int32),
        "tile_order": np.tile(np.arange(places * values.grid[0], dtype=np.int32), (*shards, 1)),
        "seen_starts": np.zeros(tokens, np.int32),
        "seen_lengths": np.zeros(tokens, np.int32),
    }


def write_tiles(batch: Any, place: tuple[int, int, int], row: Any, first: int, values: VisionValues) -> int:
    """Writes the images of row b of micro-batch g and data shard p from the shard's image ``first`` on; returns how many places it took.

    The vision tokens of a row are those of its images' tiles and then those of tiles that hold nothing, so that what a token sees is an
    interval. With ``unseen`` "hf5" a token before the first image attends to all of them, unused places included.
    """
    assert values.grid is not None and values.tiles is not None
    g, p, b = place
    tiles, patches = values.grid[0], values.grid[1] * values.grid[2]
    counts, images = [values.tiles[ratio] for ratio in row.ratios], len(row.ratios) + row.unused_images
    for i, image in enumerate(row.patches):
        at = (first + i) * tiles * patches
        batch.patches[g, p, at : at + tiles * patches] = image
    batch.aspect_ratio_ids[g, p, first : first + len(counts)] = row.ratios
    real = [(first + i) * tiles + t for i, count in enumerate(counts) for t in range(count)]
    own = range(first * tiles, (first + images) * tiles)
    batch.tile_order[g, p, own.start : own.stop] = [*real, *sorted(set(own) - set(real))]
    start, ends, at, image = own.start * (patches + 1), (patches + 1) * np.cumsum([0, *counts]), 0, 0
    for length in row.lengths:
        low, high = (image + span for span in seen_images(row.ids[at : at + length], values.image_token_id))
        sees = high > low
        blind = -len(own) * (patches + 1) if values.unseen == "hf5" else 0
        batch.seen_starts[g, b, at : at + length] = np.where(sees, start + ends[low], start)
        batch.seen_lengths[g, b, at : at + length] = np.where(sees, ends[high] - ends[low], blind)
        at, image = at + length, int(high[-1])
    return images
