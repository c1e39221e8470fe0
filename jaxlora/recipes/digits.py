"""Real handwritten digits as questions about pictures: 1,797 scans of 8 x 8 pixels (UCI's optdigits test set, from scikit-learn)."""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from jaxlora.typing import Int, UInt8

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "Which digit?"

# A pixel of a scan is this many pixels wide, and two of them are one patch: 4 x 4 patches, of which the merger makes 4 features.
SCALE = 4
PATCH_SIZE = 2 * SCALE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scans:
    """Grey scans (0 paper, 255 ink) and the digits that they show."""

    pixels: UInt8[np.ndarray, "N 8 8"]
    digits: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.digits)

    @property
    def words(self) -> list[str]:
        """The right answers."""
        return [WORDS[digit] for digit in self.digits]

    def first(self, count: int | None) -> "Scans":
        """The first so many scans; None: all."""
        return Scans(pixels=self.pixels[:count], digits=self.digits[:count])


def load_scans() -> tuple[Scans, Scans]:
    """Returns (training, test): of each digit's scans in file order, every fifth is for the test; 1,437 and 360 scans.

    Both are in an order that mixes the digits. Nothing is downloaded: the scans are part of scikit-learn.

    Raises:
      ImportError: scikit-learn is missing; says what to install.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'jaxlora[quickstart]'") from error
    grey, target = (np.asarray(found) for found in load_digits(return_X_y=True))
    pixels, digits = np.round(grey.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), target.astype(np.int64)
    by_digit = np.argsort(digits, kind="stable")
    is_test = np.zeros(len(digits), bool)
    is_test[by_digit[::5]] = True
    return Scans(pixels=pixels[~is_test], digits=digits[~is_test]), Scans(pixels=pixels[is_test], digits=digits[is_test])


def as_written(scan: UInt8[np.ndarray, "8 8"]) -> Image.Image:
    """White ink on black, upright: the domain that the model first learns."""
    size = (scan.shape[1] * SCALE, scan.shape[0] * SCALE)
    return Image.fromarray(scan).resize(size, Image.Resampling.BICUBIC).convert("RGB")


def inverted_and_turned(scan: UInt8[np.ndarray, "8 8"]) -> Image.Image:
    """Black ink on white, turned by 90 degrees against the clock: the domain that the adapter learns."""
    return ImageOps.invert(as_written(scan)).transpose(Image.Transpose.ROTATE_90)


def question(image: Image.Image) -> dict[str, Any]:
    """A user's turn that shows the image and asks for its digit."""
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}


def row(image: Image.Image, word: str) -> dict[str, Any]:
    """A training row: question and answer."""
    return {"messages": [question(image), {"role": "assistant", "content": [{"type": "text", "text": word}]}]}
