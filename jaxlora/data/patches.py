"""Whole images as Hugging Face's processors give them, cut into the patches that a batch holds (numpy only)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlora.data.positions import VisionValues
from jaxlora.typing import Float


def cut_images(inputs: Mapping[str, Any], values: VisionValues | None) -> Mapping[str, Any]:
    """``pixel_values`` [N, C, H, W] as patches [Σ h · w, E] with an ``image_grid_thw`` [N, 3]; other inputs are returned as they are.

    With ``image_sizes`` [N, 2], (height, width) in pixels, what is outside an image's own size is padding. Patches are in merge-block
    order: those of one feature are neighbours. An element's place in its patch is (channel, row, column).

    Raises:
      ValueError: an image is not of the one size that the model takes; sizes are missing, or do not fit the pixels or the patches.
    """
    pixels = inputs.get("pixel_values")
    if pixels is None or values is None or (values.grid is None and not values.row_breaks):
        return inputs
    pixels = np.asarray(pixels)
    sizes = _sizes(pixels, inputs.get("image_sizes"), values)
    size, cell = values.patch_size, values.patch_size * values.merge_size
    wrong = [f"image {i} of {h} x {w} pixels" for i, (h, w) in enumerate(sizes) if h % cell or w % cell or not h * w]
    if wrong:
        raise ValueError(f"the sides of an image must be multiples of {cell} pixels, got {', '.join(wrong)}")
    grids = [(1, h // size, w // size) for h, w in sizes]
    cut = [patches_of(image[:, :h, :w], size, values.merge_size) for image, (h, w) in zip(pixels, sizes, strict=True)]
    patches = np.concatenate(cut or [np.zeros((0, values.patch_elements))])
    kept = {name: array for name, array in inputs.items() if name != "image_sizes"}
    return {**kept, "pixel_values": patches, "image_grid_thw": np.array(grids, np.int64).reshape(-1, 3)}


def _sizes(pixels: np.ndarray, given: Any, values: VisionValues) -> list[tuple[int, int]]:
    """(height, width) of each image in pixels."""
    if values.grid is not None:
        height, width = values.grid[1] * values.patch_size, values.grid[2] * values.patch_size
        if pixels.ndim != 4 or pixels.shape[2:] != (height, width):
            wanted = f"[images, channels, {height}, {width}]"
            raise ValueError(f"pixel_values have shape {pixels.shape}, expected {wanted}; were they made by another model's processor?")
        return [(height, width)] * len(pixels)
    sizes = np.zeros((0, 2), np.int64) if given is None else np.asarray(given)
    if pixels.ndim != 4 or sizes.shape != (len(pixels), 2) or (sizes > np.array(pixels.shape[2:])).any():
        raise ValueError(
            f"pixel_values have shape {pixels.shape} and image_sizes are {sizes.tolist()}; expected [images, channels, height, width] and "
            "the (height, width) of each image within it, as the model's own processor makes them"
        )
    return [(int(h), int(w)) for h, w in sizes]


def patches_of(image: Float[np.ndarray, "C h w"], size: int, merge: int) -> Float[np.ndarray, "W E"]:
    """Patches of ``size`` x ``size`` pixels, the ``merge`` x ``merge`` of one feature next to each other.

    >>> patches_of(np.arange(8.0).reshape(1, 2, 4), 1, 2).ravel().tolist()
    [0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0]
    """
    channels, height, width = image.shape
    rows, columns = height // (merge * size), width // (merge * size)
    cut = image.reshape(channels, rows, merge, size, columns, merge, size)
    return cut.transpose(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns * merge**2, -1)
