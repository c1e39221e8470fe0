"""Images from where rows keep them to RGB, without trusting them: six formats, a pixel limit before decoding, nothing fetched."""

import base64
import binascii
import contextlib
import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64 * 1024 * 1024
ResizeDimension = Literal[0, 1, "max", "min"]
Resize = int | tuple[int, int] | None

# What Pillow raises for files that are broken, cut or hostile; its warning becomes an error where the caller asked for that.
_BROKEN = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, MemoryError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
_ORIENTATION_TAG = 0x0112


def load_image(source: Any, *, where: str = "image", image_root: str | Path | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes one image to RGB: EXIF orientation applied, transparency on white, the first frame of an animation.

    ``source`` is a PIL image, a path (inside ``image_root`` where one is given), bytes, a ``data:image/…;base64,`` or bare base64 string,
    a uint8 array [h, w] or [h, w, 1 | 3 | 4], or a ``datasets`` mapping with "bytes" or "path".

    >>> load_image(np.zeros((2, 3), np.uint8)).size
    (3, 2)

    Raises:
      ValueError: names ``where``: a URL, a path outside the root, another format, over ``max_pixels``, cut or broken.
    """
    with _opened(source, where, image_root, max_pixels) as image:
        try:
            return _to_rgb(image)
        except _BROKEN as error:
            raise ValueError(f"{where}: the image is cut or broken: {type(error).__name__}: {error}") from error


def image_size(source: Any, *, where: str = "image", image_root: str | Path | None = None, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) that `load_image` would return, read from the header: no pixel is decoded.

    >>> image_size(np.zeros((2, 3), np.uint8))
    (3, 2)
    """
    with _opened(source, where, image_root, max_pixels) as image:
        # Orientations 5 to 8 are the transposed ones.
        return (image.height, image.width) if _orientation(image) >= 5 else (image.width, image.height)


def resized_size(size: tuple[int, int], target: Resize, *, dimension: ResizeDimension = 0, multiple: int | None = None) -> tuple[int, int]:
    """(width, height) after the collator's resize rule.

    An int target shrinks an image whose compared side is longer: new = round(old · target / side), at least 1. A pair is the
    exact size. None keeps the size. ``dimension`` is the compared side: 0 width, 1 height, "max" or "min" of both. With
    ``multiple``, the sides of a resized image are rounded to multiples of it, at least one.

    >>> resized_size((1000, 300), 512), resized_size((1000, 300), 512, multiple=28), resized_size((400, 900), 512)
    ((512, 154), (504, 168), (400, 900))
    """
    if target is None:
        return size
    if isinstance(target, tuple):
        new = target
    else:
        side = {0: size[0], 1: size[1], "max": max(size), "min": min(size)}[dimension]
        if side <= target:
            return size
        new = (max(1, round(size[0] * target / side)), max(1, round(size[1] * target / side)))
    return (
        new
        if multiple is None
        else (max(multiple, round(new[0] / multiple) * multiple), max(multiple, round(new[1] / multiple) * multiple))
    )


def resize_image(image: Image.Image, target: Resize, *, dimension: ResizeDimension = 0, multiple: int | None = None) -> Image.Image:
    """The image at its `resized_size`, by Lanczos; the same object where the size stays."""
    size = resized_size(image.size, target, dimension=dimension, multiple=multiple)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


@contextlib.contextmanager
def _opened(source: Any, where: str, image_root: str | Path | None, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read; its file is open inside the block, and closed after it."""
    with contextlib.ExitStack() as files:
        try:
            opened = source if isinstance(source, Image.Image) else _stream_or_array(source, image_root)
            image = opened if isinstance(opened, Image.Image) else Image.open(files.enter_context(opened), formats=FORMATS)
        except _Refused as refusal:
            raise ValueError(f"{where}: {refusal}") from refusal
        except _BROKEN as error:
            raise ValueError(f"{where}: not a readable {', '.join(FORMATS)} image: {type(error).__name__}: {error}") from error
        pixels = image.width * image.height
        if not 0 < pixels <= max_pixels:
            raise ValueError(f"{where}: {image.width} x {image.height} = {pixels} pixels; at least 1 and at most {max_pixels} are decoded")
        yield image


class _Refused(Exception):
    """A source that is not even tried; the text says why."""


def _stream_or_array(source: Any, image_root: str | Path | None) -> io.BytesIO | io.BufferedReader | Image.Image:
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str) and source.startswith("data:"):
        return io.BytesIO(_decode_base64(source.partition(",")[2]))
    if isinstance(source, str) and "://" in source:
        raise _Refused(f"{source[:80]!r} is a URL, and nothing is fetched; download it first and give its path")
    # Base64 has no dot, and that of a real image is longer than a file name may be. (JPEG's starts with a slash.)
    if isinstance(source, str) and len(source) > 255 and "." not in source:
        return io.BytesIO(_decode_base64(source))
    if isinstance(source, str | Path):
        return _inside(source, image_root).open("rb")
    raise _Refused(f"an image is a PIL image, path, bytes, base64 string or uint8 array, got {type(source).__name__}")


def _inside(source: str | Path, image_root: str | Path | None) -> Path:
    if image_root is None:
        return Path(source)
    root = Path(image_root).resolve()
    path = (root / source).resolve()
    if not path.is_relative_to(root):
        raise _Refused(f"path {str(source)!r} leaves the image root {str(image_root)!r}")
    return path


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise _Refused(f"the string is neither a path nor valid base64: {error}") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise _Refused(
            f"an image array is uint8 [h, w] or [h, w, 1 | 3 | 4], got {array.dtype} {list(array.shape)}; "
            "move channels last, and floats from 0 to 1 to (255 * x).round().astype(uint8)"
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _orientation(image: Image.Image) -> int:
    # Pillow turns a TIFF by itself, and its size says so from the start.
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1
    # Pillow decodes a whole PNG to look for EXIF behind its pixels; only what the header holds counts here.
    if isinstance(image, PngImagePlugin.PngImageFile) and "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except _BROKEN:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if 2 <= _orientation(image) <= 8:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        image.load()
        return image
    # Pillow clips 16-bit grey to 255 instead of scaling it.
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 256).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("32-bit floating-point pixels have no agreed range; convert them to 8 bit first")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")
