"""Text and images to a model's inputs, without torch: transformers' tokenizers and Pil image processors, our own placeholders."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from jaxlora.data.images import load_image
from jaxlora.data.padding import Inputs, pad_rows, truncate_ids
from jaxlora.data.positions import Grid
from jaxlora.data.rows import media_of, read_messages
from jaxlora.data.turns import renderer
from jaxlora.errors import nearest

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_IMAGE_KEYS = (
    *("do_resize", "resample", "size", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb"),
    *("patch_size", "temporal_patch_size", "merge_size"),
)
_VIDEO_SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}


class CallOptions(TypedDict, total=False):
    """What `Qwen2VLProcessor.__call__` takes besides text and media, as in transformers; arrays are always numpy's."""

    padding: bool | str
    truncation: bool
    max_length: int | None
    add_special_tokens: bool
    pad_to_multiple_of: int | None
    return_tensors: str | None


class Qwen2VLProcessor:
    """The processor of Qwen2-VL: placeholders, patches and their grids.

    One image placeholder in the text becomes t·h·w / merge² of them, one for each feature of the image; patches are rows of
    ``pixel_values`` [Σ t·h·w, 3·2·14·14] in merge-block order. A video is a list of frames; an odd last frame is repeated.
    """

    def __init__(self, image_processor: Qwen2VLImageProcessorPil, tokenizer: Any, video_size: Mapping[str, int] | None = None):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.video_size = dict(video_size or _VIDEO_SIZE)
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> "Qwen2VLProcessor":
        """Reads transformers 4's preprocessor_config.json or 5's processor_config.json.

        ``min_pixels`` and ``max_pixels`` override its size.

        Raises:
          FileNotFoundError: no tokenizer or no image processor in the folder.
        """
        tokenizer = _load_tokenizer(Path(folder))
        image, video = _read_image_config(Path(folder)), _read_config(Path(folder), "video_preprocessor_config.json", "video_processor")
        if tokenizer is None or image is None:
            raise FileNotFoundError(f"{folder} has no {'tokenizer' if tokenizer is None else 'image processor configuration'}")
        image["size"] = {**image["size"], **_given(shortest_edge=min_pixels, longest_edge=max_pixels)}
        return cls(Qwen2VLImageProcessorPil(**image), tokenizer, _size_of(video or {}, _VIDEO_SIZE))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the files that transformers' own processor reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        config = json.loads((folder / "preprocessor_config.json").read_text())
        _write_json(folder / "preprocessor_config.json", {**config, "processor_class": "Qwen2VLProcessor"})
        video = {key: value for key, value in config.items() if key != "image_processor_type"}
        _write_json(
            folder / "video_preprocessor_config.json", {**video, "size": self.video_size, "video_processor_type": "Qwen2VLVideoProcessor"}
        )

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's chat template."""
        return self.tokenizer.chat_template

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **options: Unpack[CallOptions]) -> Inputs:
        """input_ids, attention_mask, mm_token_type_ids, and where there are images pixel_values and image_grid_thw (also of videos).

        Raises:
          ValueError: images and placeholders differ in number (the row is named), or truncation would cut an image.
          TypeError: an unknown option.
        """
        unknown = [name for name in options if name not in CallOptions.__annotations__]
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r}{nearest(unknown[0], CallOptions.__annotations__)}")
        vision = {**self.image_inputs(_flat(images)), **self.video_inputs(_videos(videos))}
        texts = [text] if isinstance(text, str) else list(text)
        ids = [self.tokenizer(one, add_special_tokens=options.get("add_special_tokens", True))["input_ids"] for one in texts]
        rows = [row for row, _ in self.expand([np.array(row, np.int64) for row in ids], vision)]
        most = options.get("max_length")
        if options.get("truncation") and most is not None:
            rows = [truncate_ids(row, most, self.media_token_ids, where=f"row {i}") for i, row in enumerate(rows)]
        if not options.get("padding") and len({len(row) for row in rows}) > 1:
            raise ValueError(f"rows of {[len(row) for row in rows]} tokens make no array; pass padding=True")
        length = most if options.get("padding") == "max_length" else None
        padded = pad_rows(rows, self.tokenizer, length=length, multiple=options.get("pad_to_multiple_of"))
        return Inputs({**padded, "mm_token_type_ids": self.token_types(padded["input_ids"]), **vision})

    @property
    def media_token_ids(self) -> tuple[int, int]:
        """The placeholders of images and of videos."""
        return self.image_token_id, self.video_token_id

    def token_types(self, input_ids: np.ndarray) -> np.ndarray:
        """mm_token_type_ids: 0 text, 1 image, 2 video."""
        return (input_ids == self.image_token_id).astype(np.int64) + 2 * (input_ids == self.video_token_id)

    def expand(
        self, rows: Sequence[np.ndarray], vision: Mapping[str, np.ndarray], names: Sequence[str] | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per row: (ids with one placeholder a feature, the index of the unexpanded token that each came from).

        Raises:
          ValueError: names the row where images run out, or says how many are left over.
        """
        left = {
            self.image_token_id: ("image", [tuple(grid) for grid in vision.get("image_grid_thw", np.zeros((0, 3))).tolist()]),
            self.video_token_id: ("video", [tuple(grid) for grid in vision.get("video_grid_thw", np.zeros((0, 3))).tolist()]),
        }
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

    def features(self, grid: Grid) -> int:
        """Placeholders of one image or video: t·h·w / merge²."""
        return grid[0] * grid[1] * grid[2] // self.image_processor.merge_size**2

    def grid_of(self, size: tuple[int, int], frames: int | None = None) -> Grid:
        """(t, h, w) in patches of an image, or of a video of ``frames``, of size (width, height).

        Raises:
          ValueError: one side is more than 200 times the other.
        """
        made = self.image_processor
        limits = self._limits(video=frames is not None)
        factor = made.patch_size * made.merge_size
        height, width = smart_resize(size[1], size[0], factor, limits["shortest_edge"], limits["longest_edge"])
        t = 1 if frames is None else -(-frames // made.temporal_patch_size)
        return t, height // made.patch_size, width // made.patch_size

    def measure(
        self, text: str, image_sizes: Sequence[tuple[int, int]] = (), video_sizes: Sequence[tuple[int, int, int]] = ()
    ) -> tuple[int, int]:
        """(tokens, patches) of a rendered text with images of (width, height) and videos of (width, height, frames)."""
        grids = [self.grid_of(size) for size in image_sizes] + [self.grid_of(size[:2], size[2]) for size in video_sizes]
        tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return tokens + sum(self.features(grid) - 1 for grid in grids), sum(t * h * w for t, h, w in grids)

    def image_inputs(self, images: Sequence[Any], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """pixel_values and image_grid_thw, or nothing where there is no image; errors carry the image's name."""
        if not images:
            return {}
        made = [self._patches([image], self._limits(), names[i] if names else f"image {i}") for i, image in enumerate(images)]
        return {
            "pixel_values": np.concatenate([patches for patches, _ in made]),
            "image_grid_thw": np.array([grid for _, grid in made], np.int64),
        }

    def video_inputs(self, videos: Sequence[Sequence[Any]], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """pixel_values_videos and video_grid_thw of videos given as lists of frames."""
        if not videos:
            return {}
        made = [self._video(frames, names[i] if names else f"video {i}") for i, frames in enumerate(videos)]
        patches, grids = [patches for patches, _ in made], [grid for _, grid in made]
        return {"pixel_values_videos": np.concatenate(patches), "video_grid_thw": np.array(grids, np.int64)}

    def _limits(self, *, video: bool = False) -> dict[str, int]:
        size = self.video_size if video else self.image_processor.size
        return {edge: size[edge] for edge in ("shortest_edge", "longest_edge")}

    def _video(self, frames: Sequence[Any], name: str) -> tuple[np.ndarray, Grid]:
        together = self.image_processor.temporal_patch_size
        frames = [*frames, *[frames[-1]] * (-len(frames) % together)]
        stills, (_, h, w) = self._patches(frames, self._limits(video=True), name)
        # [T, K, h·w, C, K, p, p]: still k of a group gives the k-th of its K temporal slices, which are all that still.
        size = self.image_processor.patch_size
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

    def apply_chat_template(
        self, messages: Sequence[Any], *, tokenize: bool = False, add_generation_prompt: bool = False, **variables: Any
    ) -> Any:
        """The rendered text of one conversation (a list of texts for several), or with ``tokenize`` the inputs with its images."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        chats = [read_messages(chat, where=f"row {i}") for i, chat in enumerate(messages if several else [messages])]
        render_turns = renderer(
            self.tokenizer, **{key: value for key, value in variables.items() if key not in ("return_dict", "return_tensors")}
        )
        texts = [render_turns(chat, add_generation_prompt).text for chat in chats]
        if not tokenize:
            return texts if several else texts[0]
        media = {kind: [item for chat in chats for item in media_of(chat, kind)] for kind in ("image", "video")}
        return self(media["image"] or None, texts, media["video"] or None, add_special_tokens=False, padding=True)

    def decode(self, *args: Any, **options: Any) -> str:
        """The tokenizer's ``decode``."""
        return self.tokenizer.decode(*args, **options)

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        """The tokenizer's ``batch_decode``."""
        return self.tokenizer.batch_decode(*args, **options)


# One line a model_type whose processor is more than a tokenizer.
PROCESSORS = {"qwen2_vl": Qwen2VLProcessor}


def load_processor(folder: str | Path, model_type: str, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """The processor of a vision-language model, else the tokenizer, else None with a warning that says what the folder lacks."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        warnings.warn(f"{folder} has none of {', '.join(TOKENIZER_FILES)}: the model loads without a tokenizer", stacklevel=2)
        return None
    if model_type not in PROCESSORS:
        return _load_tokenizer(folder)
    if _read_image_config(folder) is None:
        warnings.warn(f"{folder} has no image processor configuration: {model_type} loads with its tokenizer alone", stacklevel=2)
        return _load_tokenizer(folder)
    return PROCESSORS[model_type].from_pretrained(folder, min_pixels=min_pixels, max_pixels=max_pixels)


def _load_tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    older = folder / "chat_template.json"
    if not tokenizer.chat_template and older.is_file():
        tokenizer.chat_template = json.loads(older.read_text())["chat_template"]
    return tokenizer


def _read_config(folder: Path, own_file: str, section: str) -> dict[str, Any] | None:
    """A file of its own (transformers 4), or a section of processor_config.json (5)."""
    if (folder / own_file).is_file():
        return json.loads((folder / own_file).read_text())
    together = folder / "processor_config.json"
    return json.loads(together.read_text()).get(section) if together.is_file() else None


def _read_image_config(folder: Path) -> dict[str, Any] | None:
    config = _read_config(folder, "preprocessor_config.json", "image_processor")
    if config is None:
        return None
    kept = {key: config[key] for key in _IMAGE_KEYS if config.get(key) is not None}
    return {**kept, "size": _size_of(config, dict(Qwen2VLImageProcessorPil.size))}


def _size_of(config: Mapping[str, Any], default: Mapping[str, int]) -> dict[str, int]:
    """Limits in pixels: size's shortest_edge and longest_edge, which older files call min_pixels and max_pixels."""
    size = config.get("size") or {}
    older = _given(shortest_edge=config.get("min_pixels"), longest_edge=config.get("max_pixels"))
    within = _given(shortest_edge=size.get("min_pixels"), longest_edge=size.get("max_pixels"))
    named = _given(shortest_edge=size.get("shortest_edge"), longest_edge=size.get("longest_edge"))
    return {**default, **within, **named, **older}


def _given(**values: int | None) -> dict[str, int]:
    return {name: value for name, value in values.items() if value is not None}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _flat(images: Any) -> list[Any]:
    """Images of all rows in order: one image, a list, or a list a row."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [image for row in images for image in (row if isinstance(row, list | tuple) else [row])]


def _videos(videos: Any) -> list[Sequence[Any]]:
    if videos is None or not len(videos):
        return []
    return [videos] if isinstance(videos[0], Image.Image | np.ndarray) and np.ndim(videos[0]) <= 3 else list(videos)
