"""LLaVA's and Pixtral's processors: text and images to the model's inputs, without torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.image_utils import ChannelDimension
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil, get_resize_output_image_size
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from jaxlora.data.image_text import ImageTextProcessor, read_folder
from jaxlora.data.positions import Grid

_IMAGE_KEYS = (
    *"do_resize resample size do_center_crop crop_size do_rescale rescale_factor do_normalize image_mean image_std".split(),
    "do_convert_rgb",
)
_SQUARE = {"CLIPImageProcessor": CLIPImageProcessorPil, "SiglipImageProcessor": SiglipImageProcessorPil}


def load_llava(folder: str | Path, *, merge: int = 1, min_pixels: int | None = None, max_pixels: int | None = None) -> ImageTextProcessor:
    """The processor of a LLaVA, Pixtral or Mistral 3 folder, by the image processor that it names; files are transformers 4's or 5's.

    ``merge`` is Pixtral's spatial_merge_size where no file names one.

    Raises:
      FileNotFoundError: no tokenizer or no image processor in the folder.
      NotImplementedError: another image processor.
      ValueError: ``min_pixels`` or ``max_pixels``.
    """
    tokenizer, config, whole, model = read_folder(Path(folder), "LLaVA", min_pixels=min_pixels, max_pixels=max_pixels)
    given = {key: config[key] for key in _IMAGE_KEYS if config.get(key) is not None}
    kind = str(config.get("image_processor_type", "CLIPImageProcessor")).removesuffix("Fast").removesuffix("Pil")
    patch = whole.get("patch_size") or model.get("vision_config", {}).get("patch_size")
    if kind == "PixtralImageProcessor":
        own = config.get("patch_size")
        patch = patch or (own["height"] if isinstance(own, Mapping) else own) or 16
        merge = whole.get("spatial_merge_size") or model.get("spatial_merge_size") or merge
        return PixtralProcessor(PixtralImageProcessorPil(**given), tokenizer, patch, merge)
    if kind not in _SQUARE:
        known = ", ".join([*_SQUARE, "PixtralImageProcessor"])
        raise NotImplementedError(f"{folder} asks for image_processor_type {kind!r}; there are {known}")
    return LlavaProcessor(_SQUARE[kind](**given), tokenizer, patch or 14)


class LlavaProcessor(ImageTextProcessor):
    """The processor of LLaVA: every image is one square of pixels, and ``<image>`` becomes one placeholder a patch.

    ``pixel_values`` are [images, channels, height, width].
    """

    name, processor_class = "LLaVA", "LlavaProcessor"

    def __init__(self, image_processor: CLIPImageProcessorPil | SiglipImageProcessorPil, tokenizer: Any, patch_size: int = 14):
        super().__init__(image_processor, tokenizer, getattr(tokenizer, "image_token", None) or "<image>")
        self.patch_size = patch_size

    def whole_config(self) -> dict[str, Any]:
        """How transformers counts the tokens of an image: CLIP's class token is added, and dropped by the strategy."""
        clip = isinstance(self.image_processor, CLIPImageProcessorPil)
        return {
            "image_token": self.image_token,
            "num_additional_image_tokens": int(clip),
            "patch_size": self.patch_size,
            "vision_feature_select_strategy": "default" if clip else "full",
        }

    def tokens_of(self, grid: Grid) -> np.ndarray:
        """One placeholder a patch."""
        return np.full(grid[1] * grid[2], self.image_token_id)

    def grid_of(self, size: tuple[int, int], frames: int | None = None) -> Grid:
        """(1, h, w) in patches of an image, whatever its size.

        Raises:
          ValueError: for a video.
        """
        self.refuse_video(frames)
        made = self.image_processor
        square = made.crop_size if getattr(made, "do_center_crop", False) and made.crop_size else made.size
        return 1, square["height"] // self.patch_size, square["width"] // self.patch_size


class PixtralProcessor(ImageTextProcessor):
    """The processor of Pixtral: images keep their shape, and a row of features ends with a token of its own.

    ``[IMG]`` becomes w times ``[IMG]`` and ``[IMG_BREAK]`` for each of h rows, the last of which ends with ``[IMG_END]``.
    ``pixel_values`` [images, channels, height, width] are padded to the largest image, ``image_sizes`` [images, 2] are (height, width).
    """

    name, processor_class = "Pixtral", "PixtralProcessor"

    def __init__(self, image_processor: PixtralImageProcessorPil, tokenizer: Any, patch_size: int = 16, spatial_merge_size: int = 1):
        super().__init__(image_processor, tokenizer, "[IMG]")
        self.patch_size, self.spatial_merge_size = patch_size, spatial_merge_size
        self.image_break_token, self.image_end_token = "[IMG_BREAK]", "[IMG_END]"
        self.image_break_token_id, self.image_end_token_id = tokenizer.convert_tokens_to_ids([self.image_break_token, self.image_end_token])

    @property
    def cell(self) -> int:
        """The side of a feature in pixels."""
        return self.patch_size * self.spatial_merge_size

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """The ids of an image's tokens."""
        return self.image_token_id, self.image_break_token_id, self.image_end_token_id

    def whole_config(self) -> dict[str, Any]:
        """The sizes, and the tokens of an image."""
        return {
            "image_break_token": self.image_break_token,
            "image_end_token": self.image_end_token,
            "image_token": self.image_token,
            "patch_size": self.patch_size,
            "spatial_merge_size": self.spatial_merge_size,
        }

    def tokens_of(self, grid: Grid) -> np.ndarray:
        """A row of placeholders and a break for each row of features; the last break is the end."""
        rows, columns = grid[1] // self.spatial_merge_size, grid[2] // self.spatial_merge_size
        tokens = np.full((rows, columns + 1), self.image_token_id)
        tokens[:, -1] = self.image_break_token_id
        tokens[-1, -1] = self.image_end_token_id
        return tokens.ravel()

    def grids(self, vision: Mapping[str, np.ndarray]) -> list[Grid]:
        """(1, h, w) in patches of each image, from its inputs."""
        if "image_sizes" in vision:
            return [(1, int(h) // self.patch_size, int(w) // self.patch_size) for h, w in vision["image_sizes"]]
        return super().grids(vision)

    def grid_of(self, size: tuple[int, int], frames: int | None = None) -> Grid:
        """(1, h, w) in patches of an image of size (width, height).

        Raises:
          ValueError: for a video, or an image so long that nothing is left of its other side.
        """
        self.refuse_video(frames)
        most = self.image_processor.size
        limits = (most["longest_edge"],) * 2 if most.get("longest_edge") else (most["height"], most["width"])
        blank = np.broadcast_to(np.uint8(0), (size[1], size[0], 3))
        height, width = get_resize_output_image_size(blank, limits, self.cell, ChannelDimension.LAST)
        if not height or not width:
            raise ValueError(f"an image of {size[0]} x {size[1]} pixels, made to fit {limits[1]} x {limits[0]}, has no pixel on one side")
        return 1, height // self.patch_size, width // self.patch_size

    def pixels(self, images: Sequence[Any]) -> dict[str, np.ndarray]:
        """The padded images, and their sizes."""
        for image in images:
            self.grid_of(image.size)
        made = self.image_processor(list(images), patch_size=self.cell, return_tensors="np")
        return {"pixel_values": made["pixel_values"], "image_sizes": made["image_sizes"]}
