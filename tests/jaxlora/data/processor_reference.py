"""What transformers' Qwen-VL processors make of texts, images and videos: made now if there is an oracle, else the committed files."""

import functools
import json
import pathlib
import tempfile

import numpy as np
from PIL import Image

from jaxlora.recipes.tiny_tokenizer import PREPROCESSOR, make_tokenizer
from tests.jaxlora import reference

PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
# Every limit is met: below the least size, above the largest, one side a pixel.
SIZES = [(90, 60), (29, 110), (300, 40), (640, 480), (481, 639), (57, 57), (31, 200), (1, 150), (1023, 91), (333, 777)]
# Special tokens and single bytes only: their ids do not depend on how the tokenizer was trained.
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
TEXTS = [f"{3 * PICTURE}<|im_end|>", "7", f"<|im_start|>{7 * PICTURE}"]
# A placeholder alone: where vision tokens are around it, transformers 5 keeps them around Qwen3-VL's times, and the reference does not.
VIDEO_TEXTS = ["7<|video_pad|>7<|video_pad|>", "<|video_pad|>7"]
# Frames, and frames a second, of each video. The first needs no resizing; the others are above and below the limits.
VIDEOS = [(3, 4.0), (4, 2.0), (7, 0.5)]


def cell(model_type):
    """The side of a merged cell in pixels."""
    return 32 if model_type == "qwen3_vl" else 28


def write_folder(folder, model_type):
    """A tokenizer, and configurations of images and videos with small limits."""
    folder = make_tokenizer(folder, "qwen2_vl")
    area, own = cell(model_type) ** 2, {}
    if model_type == "qwen3_vl":
        own = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    config = {**PREPROCESSOR, **own, "size": {"shortest_edge": 4 * area, "longest_edge": 16 * area}}
    video = {key: value for key, value in config.items() if key != "image_processor_type"}
    video["size"] = {"shortest_edge": 8 * area, "longest_edge": (48 if model_type == "qwen3_vl" else 16) * area}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return folder


def picture(width, height, shift=0):
    ramp = np.add.outer(7 * np.arange(height), 5 * np.arange(width))[..., None] + np.array([0, 85, 170]) + shift
    return Image.fromarray((ramp % 256).astype(np.uint8))


def images():
    return [picture(*size) for size in SIZES]


def film(model_type, i):
    """The frames of a video."""
    width, height = [(4 * cell(model_type), 3 * cell(model_type)), (300, 150), (45, 61)][i]
    return [picture(width, height, 11 * t) for t in range(VIDEOS[i][0])]


def golden(model_type, kind):
    return reference.TESTS / "golden" / "processors" / f"{model_type}_{kind}.npz"


@functools.cache
def expected(model_type, kind):
    """What transformers made of ``kind`` "image" or "video"; videos are never made live, since the oracle has no torchvision."""
    with tempfile.TemporaryDirectory() as scratch:
        path = golden(model_type, kind)
        if reference.ORACLE_PYTHON and kind == "image":
            path = pathlib.Path(scratch, "made.npz")
            write(model_type, kind, path)
        with np.load(path) as file:
            return dict(file)


def write(model_type, kind, target):
    """Has transformers process the images, or the videos: for these, the oracle's Python needs torchvision."""
    films = [np.stack([np.asarray(frame) for frame in film(model_type, i)]) for i in range(len(VIDEOS))]
    media = {"image": [np.asarray(image) for image in images()], "video": films}[kind]
    video = "Qwen3VLVideoProcessor" if model_type == "qwen3_vl" else "Qwen2VLVideoProcessor"
    with tempfile.TemporaryDirectory() as scratch:
        spec = {
            "processor": PROCESSORS[model_type],
            "video_processor": video if kind == "video" else None,
            "folder": str(write_folder(pathlib.Path(scratch, "folder"), model_type)),
            "media": f"{scratch}/media.npz",
            "texts": VIDEO_TEXTS if kind == "video" else TEXTS,
            "fps": [fps for _, fps in VIDEOS],
        }
        np.savez(spec["media"], **{f"{kind}_{i}": array for i, array in enumerate(media)})
        pathlib.Path(scratch, "spec.json").write_text(json.dumps(spec))
        reference.run_oracle("make_processor.py", f"{scratch}/spec.json", target)


def write_all(folder, kind):
    """The committed files of one kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for model_type in PROCESSORS:
        write(model_type, kind, golden(model_type, kind))
