"""The Qwen-VL processors: text, images and videos to a model's inputs, without torch."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from jaxlora.data.images import load_image
from jaxlora.data.padding import Inputs
from jaxlora.data.positions import Grid
from jaxlora.data.processor import CallOptions, Processor, check_options, flat
from jaxlora.data.processor_files import given, load_tokenizer, read_config, read_image_config, size_of, write_json
from jaxlora.data.rows import DEFAULT_FPS, fps_of, media_of

# No limit: a frame is already of the size that its video has.
_ANY_SIZE = {"shortest_edge": 1, "longest_edge": 2**62}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVLFamily:
    """How the Qwen-VL processors differ.

    ``video_limits`` are the pixels of a frame (or, with ``limits_whole_video``, of all frames together) where a folder does not say. A
    video's times go to the model as seconds (``second_per_grid_ts``), as text before each pair of frames, or not at all.
    """

    processor_class: str
    video_processor_class: str = "Qwen2VLVideoProcessor"
    video_limits: tuple[int, int] = (128 * 28 * 28, 768 * 28 * 28)
    limits_whole_video: bool = False
    seconds_per_grid: bool = False
    times_as_text: bool = False


QWEN2_VL = QwenVLFamily(processor_class="Qwen2VLProcessor")
QWEN2_5_VL = QwenVLFamily(processor_class="Qwen2_5_VLProcessor", seconds_per_grid=True)
QWEN3_VL = QwenVLFamily(
    processor_class="Qwen3VLProcessor",
    video_processor_class="Qwen3VLVideoProcessor",
    video_limits=(128 * 32 * 32, 768 * 32 * 32),
    limits_whole_video=True,
    times_as_text=True,
)


class QwenVLOptions(CallOptions, total=False):
    """`CallOptions`, and how many frames a second the videos have."""

    fps: float | Sequence[float] | None


class QwenVLProcessor(Processor):
    """The processor of the Qwen-VL models: placeholders, patches and their grids.

    One image placeholder in the text becomes t·h·w / merge² of them, one for each feature of the image; patches are rows of
    ``pixel_values`` [Σ t·h·w, channels · frames · height · width of a patch] in merge-block order. A video is a list of frames, taken
    ``fps`` times a second; an odd last frame is repeated. In Qwen3-VL's text every pair of frames has its time and its own placeholder.
    """

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil,
        tokenizer: Any,
        video_size: Mapping[str, int] | None = None,
        family: QwenVLFamily = QWEN2_VL,
    ):
        super().__init__(image_processor, tokenizer)
        self.family = family
        self.video_size = dict(video_size or _edges(family.video_limits))
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None, family: QwenVLFamily = QWEN2_VL
    ) -> "QwenVLProcessor":
        """Reads transformers 4's preprocessor_config.json or 5's processor_config.json.

        ``min_pixels`` and ``max_pixels`` override its size.

        Raises:
          FileNotFoundError: no tokenizer or no image processor in the folder.
        """
        tokenizer = load_tokenizer(Path(folder))
        image, video = read_image_config(Path(folder)), read_config(Path(folder), "video_preprocessor_config.json", "video_processor")
        if tokenizer is None or image is None:
            raise FileNotFoundError(f"{folder} has no {'tokenizer' if tokenizer is None else 'image processor configuration'}")
        image["size"] = {**image["size"], **given(shortest_edge=min_pixels, longest_edge=max_pixels)}
        return cls(Qwen2VLImageProcessorPil(**image), tokenizer, size_of(video or {}, _edges(family.video_limits)), family)

    def write(self, folder: Path) -> None:
        """Writes the tokenizer's, the image processor's and the video processor's files."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        config = json.loads((folder / "preprocessor_config.json").read_text())
        write_json(folder / "preprocessor_config.json", {**config, "processor_class": self.family.processor_class})
        video = {key: value for key, value in config.items() if key != "image_processor_type"}
        video |= {"size": self.video_size, "video_processor_type": self.family.video_processor_class}
        write_json(folder / "video_preprocessor_config.json", video)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **options: Unpack[QwenVLOptions]) -> Inputs:
        """input_ids, attention_mask, mm_token_type_ids, and where there are images pixel_values and image_grid_thw (also of videos).

        ``fps`` is how many frames a second the videos have: a number, or one for each.

        Raises:
          ValueError: images and placeholders differ in number (the row is named), or truncation would cut an image.
          TypeError: an unknown option.
        """
        check_options(options, QwenVLOptions.__annotations__)
        films = _videos(videos)
        fps = _one_each(options.get("fps"), len(films))
        vision = {**self.image_inputs(flat(images)), **self.video_inputs(films, fps=fps)}
        told = zip([len(film) for film in films], fps, strict=True)
        texts = [self.prepare(one, told) for one in ([text] if isinstance(text, str) else text)]
        ids = [self.tokenizer(one, add_special_tokens=options.get("add_special_tokens", True))["input_ids"] for one in texts]
        rows = [row for row, _ in self.expand([np.array(row, np.int64) for row in ids], vision)]
        padded = self.padded(rows, options)
        return Inputs({**padded, **self.token_types(padded["input_ids"]), **vision})

    @property
    def media_token_ids(self) -> tuple[int, int]:
        """The placeholders of images and of videos."""
        return self.image_token_id, self.video_token_id

    def token_types(self, input_ids: np.ndarray) -> dict[str, np.ndarray]:
        """mm_token_type_ids: 0 text, 1 image, 2 video."""
        return {"mm_token_type_ids": (input_ids == self.image_token_id).astype(np.int64) + 2 * (input_ids == self.video_token_id)}

    def expand(
        self, rows: Sequence[np.ndarray], vision: Mapping[str, np.ndarray], names: Sequence[str] | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per row: (ids with one placeholder a feature, the index of the unexpanded token that each came from).

        Raises:
          ValueError: names the row where images run out, or says how many are left over.
        """
        images, videos = (
            [tuple(grid) for grid in vision.get(f"{kind}_grid_thw", np.zeros((0, 3))).tolist()] for kind in ("image", "video")
        )
        if self.family.times_as_text:
            videos = [(1, h, w) for t, h, w in videos for _ in range(int(t))]
        left = {self.image_token_id: ("image", images), self.video_token_id: ("video", videos)}
        names = names or [f"row {i}" for i in range(len(rows))]
        expanded = []
        for name, ids in zip(names, rows, strict=True):
            repeats = np.ones(len(ids), np.int64)
            for at in np.flatnonzero(np.isin(ids, self.media_token_ids)):
                kind, grids = left[int(ids[at])]
                if not grids:
                    raise ValueError(f"{name}: more {kind} placeholders in the text than {kind}s")
                repeats[at] = self.features(grids.pop(0))
            source = np.repeat(np.arange(len(ids)), repeats)
            expanded.append((ids[source], source))
        for kind, grids in left.values():
            if grids:
                raise ValueError(
                    f"row {len(rows) - 1}: {len(grids)} {kind}s more than placeholders; put a {{'type': '{kind}'}} part in a message"
                )
        return expanded

    def prepare(self, text: str, videos: Iterable[tuple[int, float]] = ()) -> str:
        """A rendered text as it is tokenised: where the model reads times, a time and a placeholder for each pair of frames of a video.

        ``videos`` are (frames, frames a second), taken as placeholders come. The time is the mean of the pair's, in seconds from the first
        frame. Vision tokens around a placeholder are replaced with it: so the models were trained, while transformers 5 keeps them around
        the whole video.
        """
        if not self.family.times_as_text:
            return text
        left = iter(videos)

        def written_out(found: re.Match[str]) -> str:
            times = self.times(*next(left, (0, 1.0)))
            return "".join(f"<{time:.1f} seconds><|vision_start|>{self.video_token}<|vision_end|>" for time in times) or found[0]

        pattern = rf"<\|vision_start\|>{re.escape(self.video_token)}<\|vision_end\|>|{re.escape(self.video_token)}"
        return re.sub(pattern, written_out, text)

    def times(self, frames: int, fps: float) -> list[float]:
        """The mean time of each group of frames that make one patch, in seconds from the first frame."""
        together = self.image_processor.temporal_patch_size
        groups = [range(at, at + together) for at in range(0, frames, together)]
        return [(min(group[0], frames - 1) + min(group[-1], frames - 1)) / 2 / fps for group in groups]

    def features(self, grid: Grid) -> int:
        """Placeholders of one image or video: t·h·w / merge²."""
        return grid[0] * grid[1] * grid[2] // self.image_processor.merge_size**2

    def grid_of(self, size: tuple[int, int], frames: int | None = None) -> Grid:
        """(t, h, w) in patches of an image, or of a video of ``frames``, of size (width, height).

        Raises:
          ValueError: one side is more than 200 times the other.
        """
        made, limits = self.image_processor, self._limits(video=frames is not None)
        factor, together = made.patch_size * made.merge_size, made.temporal_patch_size
        least, most = limits["shortest_edge"], limits["longest_edge"]
        if frames is not None and self.family.limits_whole_video:
            height, width = _resized_video(frames, size[1], size[0], factor, together, (least, most))
        else:
            height, width = smart_resize(size[1], size[0], factor, least, most)
        t = 1 if frames is None else -(-frames // together)
        return t, height // made.patch_size, width // made.patch_size

    def measure(
        self, text: str, image_sizes: Sequence[tuple[int, int]] = (), video_sizes: Sequence[tuple[int, int, int]] = ()
    ) -> tuple[int, int]:
        """(tokens, patches) of a rendered text with images of (width, height) and videos of (width, height, frames)."""
        images, videos = [self.grid_of(size) for size in image_sizes], [self.grid_of(size[:2], size[2]) for size in video_sizes]
        written_out = self.prepare(text, [(size[2], DEFAULT_FPS) for size in video_sizes])
        ids = np.array(self.tokenizer(written_out, add_special_tokens=False)["input_ids"], np.int64)
        grids = {"image_grid_thw": np.array(images).reshape(-1, 3), "video_grid_thw": np.array(videos).reshape(-1, 3)}
        [(expanded, _)] = self.expand([ids], grids)
        return len(expanded), sum(t * h * w for t, h, w in images + videos)

    def image_inputs(self, images: Sequence[Any], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """pixel_values and image_grid_thw, or nothing where there is no image; errors carry the image's name."""
        if not images:
            return {}
        made = [self._patches([image], self._limits(), names[i] if names else f"image {i}") for i, image in enumerate(images)]
        return {
            "pixel_values": np.concatenate([patches for patches, _ in made]),
            "image_grid_thw": np.array([grid for _, grid in made], np.int64),
        }

    def video_inputs(
        self, videos: Sequence[Sequence[Any]], names: Sequence[str] | None = None, fps: Sequence[float] | None = None
    ) -> dict[str, np.ndarray]:
        """pixel_values_videos and video_grid_thw of videos given as lists of frames, and where the model reads it second_per_grid_ts."""
        if not videos:
            return {}
        made = [self._video(frames, names[i] if names else f"video {i}") for i, frames in enumerate(videos)]
        patches, grids = [patches for patches, _ in made], [grid for _, grid in made]
        inputs = {"pixel_values_videos": np.concatenate(patches), "video_grid_thw": np.array(grids, np.int64)}
        if self.family.seconds_per_grid:
            rates = np.array(fps if fps is not None else [DEFAULT_FPS] * len(videos))
            inputs["second_per_grid_ts"] = (self.image_processor.temporal_patch_size / rates).astype(np.float32)
        return inputs

    def _limits(self, *, video: bool = False) -> dict[str, int]:
        size = self.video_size if video else self.image_processor.size
        return {edge: size[edge] for edge in ("shortest_edge", "longest_edge")}

    def _video(self, frames: Sequence[Any], name: str) -> tuple[np.ndarray, Grid]:
        together, size = self.image_processor.temporal_patch_size, self.image_processor.patch_size
        loaded = [load_image(frame, where=name) for frame in frames]
        try:
            _, h, w = self.grid_of(loaded[0].size, len(frames))
        except ValueError as error:
            raise ValueError(f"{name} of {len(frames)} frames of {loaded[0].width} x {loaded[0].height} pixels: {error}") from error
        loaded = [frame.resize((w * size, h * size), Image.Resampling.BICUBIC) for frame in loaded]
        frames = [*loaded, *[loaded[-1]] * (-len(loaded) % together)]
        stills, _ = self._patches(frames, _ANY_SIZE, name)
        # [T, K, h·w, C, K, p, p]: still k of a group gives the k-th of its K temporal slices, which are all that still.
        slices = stills.reshape(len(frames) // together, together, h * w, -1, together, size, size)
        patches = np.stack([slices[:, k, :, :, k] for k in range(together)], axis=3)
        return patches.reshape(-1, stills.shape[-1]), (len(frames) // together, h, w)

    def _patches(self, images: Sequence[Any], size: dict[str, int], name: str) -> tuple[np.ndarray, Grid]:
        loaded = [load_image(image, where=name) for image in images]
        try:
            made = self.image_processor(loaded, size=size)
        except ValueError as error:
            raise ValueError(f"{name} of {loaded[0].width} x {loaded[0].height} pixels: {error}") from error
        t, h, w = (int(n) for n in made["image_grid_thw"][0])
        return made["pixel_values"], (t, h, w)

    def inputs_of_chats(self, chats: Sequence[Any], texts: Sequence[str]) -> Inputs:
        """The inputs of rendered conversations, with their images and videos."""
        media = {kind: [item for chat in chats for item in media_of(chat, kind)] for kind in ("image", "video")}
        fps = [rate for chat in chats for rate in fps_of(chat)]
        return self(media["image"] or None, list(texts), media["video"] or None, add_special_tokens=False, padding=True, fps=fps)


def _edges(limits: tuple[int, int]) -> dict[str, int]:
    return dict(zip(("shortest_edge", "longest_edge"), limits, strict=True))


def _resized_video(frames: int, height: int, width: int, factor: int, together: int, limits: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of frames whose pixels together are within limits, as Qwen3-VL's video processor chooses them.

    Raises:
      ValueError: fewer frames than make one patch, or one side is more than 200 times the other.
    """
    if frames < together:
        raise ValueError(f"a video needs at least {together} frames")
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"one side is more than 200 times the other: {height} x {width}")
    counted = round(frames / together) * together
    high, wide = (round(side / factor) * factor for side in (height, width))
    if counted * high * wide > limits[1]:
        beta = math.sqrt(frames * height * width / limits[1])
        high, wide = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif counted * high * wide < limits[0]:
        beta = math.sqrt(limits[0] / (frames * height * width))
        high, wide = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return high, wide


def _one_each(fps: float | Sequence[float] | None, count: int) -> list[float]:
    rates = [DEFAULT_FPS] * count if fps is None else [float(fps)] * count if isinstance(fps, int | float) else [float(r) for r in fps]
    if len(rates) != count or any(not rate > 0 for rate in rates):
        raise ValueError(f"fps must be a positive number, or one for each of the {count} videos; got {fps!r}")
    return rates


def _videos(videos: Any) -> list[Sequence[Any]]:
    if videos is None or not len(videos):
        return []
    return [videos] if isinstance(videos[0], Image.Image | np.ndarray) and np.ndim(videos[0]) <= 3 else list(videos)
