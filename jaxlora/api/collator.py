"""The collator of vision-language rows."""

import logging
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jaxlora.data.collate import CollateOptions, collate, measure_row
from jaxlora.data.images import Resize
from jaxlora.data.padding import Inputs
from jaxlora.data.responses import make_markers

_LOG = logging.getLogger(__name__)

# Qwen2-VL's config names no image size; this is the width that large images are then brought to.
_DEFAULT_WIDTH = 512


class UnslothVisionDataCollator:
    """Rows with messages and images to one micro-batch of numpy arrays with Hugging Face's names.

    A row holds "messages" or "conversations" (or is the list of messages itself), or "prompt" and "completion"; its images stand in
    the messages or in a column "images". Rows without an image, with one or with several may be mixed.

    Args:
      model: read for ``max_seq_length`` and ``config.vision_config``.
      processor: as `jaxlora.data.processors.load_processor` returns it.
      max_seq_length: longer rows are cut; None takes the model's, and any other value than an int cuts nothing. A cut through an image
        is refused with the row's index.
      formatting_func: applied to each row first.
      resize: images wider than this many pixels are made smaller; "min" takes the tower's image_size (an exact size where that is a
        pair, 512 where there is none), "max" resizes nothing, (width, height) is exact. A dataset whose images all have one size trains
        faster: their tower attends without offsets.
      ignore_index: the label of what is not trained.
      train_on_responses_only: train the assistant's turns only, found by the chat template, or by ``instruction_part`` and
        ``response_part`` where both are given (``force_match``: their exact tokens). False trains prompts too.
      num_proc: no effect.
      last_response_only: of the responses, train the last.
      completion_only_loss: of prompt and completion, train the completion.
      pad_to_multiple_of: rounds the length of the micro-batch up.
      resize_dimension: the side that ``resize`` compares: 0 width, 1 height, "max" or "min" of both.
      image_root: the folder that image paths are relative to, and may not leave; None: any path that this process can read.
      snap_to_patch_size: sides of resized images become multiples of two patches.

    Raises:
      TypeError: a processor without an image processor, an unknown ``resize`` or ``resize_dimension``.
      ValueError: one of the two markers without the other.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_seq_length: Any = None,
        formatting_func: Callable[[Any], Any] | None = None,
        resize: Any = "min",
        ignore_index: int = -100,
        train_on_responses_only: bool = False,
        instruction_part: str | None = None,
        response_part: str | None = None,
        force_match: bool = True,
        num_proc: int | None = None,
        last_response_only: bool = False,
        completion_only_loss: bool = True,
        pad_to_multiple_of: int | None = None,
        resize_dimension: Literal[0, 1, "max", "min"] = 0,
        snap_to_patch_size: bool = False,
        *,
        image_root: str | pathlib.Path | None = None,
    ):
        if getattr(processor, "image_processor", None) is None:
            raise TypeError(f"{type(processor).__name__} has no image_processor: this collator is only for image models")
        if resize_dimension not in (0, 1, "max", "min"):
            raise TypeError(f"resize_dimension is 0, 1, 'max' or 'min', got {resize_dimension!r}")
        vision = _entry(_entry(model, "config"), "vision_config")
        by_markers = train_on_responses_only and (instruction_part is not None or response_part is not None)
        tokenizer = processor.tokenizer
        self.processor = processor
        self.options = CollateOptions(
            max_seq_length=_longest(model, max_seq_length),
            formatting_func=formatting_func,
            resize=_target(resize, vision),
            resize_dimension=resize_dimension,
            snap=2 * _patch_size(vision) if snap_to_patch_size else None,
            ignore_index=ignore_index,
            responses_only=train_on_responses_only,
            last_response_only=last_response_only,
            markers=make_markers(tokenizer, instruction_part, response_part, force_match=force_match) if by_markers else None,
            completion_only_loss=completion_only_loss,
            pad_to_multiple_of=pad_to_multiple_of,
            image_root=image_root,
        )

    def __call__(self, rows: Sequence[Any]) -> Inputs:
        """input_ids, attention_mask, labels, mm_token_type_ids [b, s]; pixel_values [patches, E] and image_grid_thw [images, 3] if any."""
        return collate(rows, self.processor, self.options)

    def measure(self, row: Any, *, where: str = "row") -> tuple[int, int, int]:
        """(tokens, patches, frames) of a row, without decoding its images."""
        return measure_row(row, self.processor, self.options, where=where)


VisionDataCollator = UnslothVisionDataCollator


def _entry(holder: Any, name: str) -> Any:
    """A value of a config, which is an object or a mapping; None where it is not there."""
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def _longest(model: Any, max_seq_length: Any) -> int | None:
    longest = _entry(model, "max_seq_length") if max_seq_length is None else max_seq_length
    return longest if isinstance(longest, int) and not isinstance(longest, bool) else None


def _target(resize: Any, vision: Any) -> Resize:
    if resize == "max":
        return None
    if resize == "min":
        size = _entry(vision, "image_size")
        if size is None:
            _LOG.warning(
                "resize='min', but the tower has no image_size: wider images become %d pixels wide (resize='max': as is)", _DEFAULT_WIDTH
            )
            return _DEFAULT_WIDTH
        return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else int(size)
    if isinstance(resize, int) and not isinstance(resize, bool) and resize > 0:
        return resize
    if isinstance(resize, list | tuple) and len(resize) == 2 and all(isinstance(side, int) and side > 0 for side in resize):
        return resize[0], resize[1]
    raise TypeError(f"resize is 'min', 'max', a number of pixels or (width, height), got {resize!r}")


def _patch_size(vision: Any) -> int:
    size = _entry(vision, "patch_size")
    if size is None:
        return 16 if _entry(vision, "model_type") in ("gemma3n", "pixtral") else 14
    return math.lcm(*size) if isinstance(size, list | tuple) else int(size)
