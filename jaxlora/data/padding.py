"""Rows of token ids to rectangular arrays with Hugging Face's names, and the only place where a row is ever cut."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlora.typing import Int

IGNORE = -100


class Inputs(dict[str, Any]):
    """A model's inputs by Hugging Face's names."""

    def to(self, *args: Any, **options: Any) -> "Inputs":
        """Itself: JAX moves arrays when a step needs them. Here so that scripts written for torch run."""
        return self


def pad_rows(
    rows: Sequence[np.ndarray],
    tokenizer: Any,
    *,
    labels: Sequence[np.ndarray] | None = None,
    length: int | None = None,
    multiple: int | None = None,
) -> Inputs:
    """input_ids, attention_mask and labels [b, s], padded on the tokenizer's side to the longest row or ``length``, then to ``multiple``.

    Padding is marked by place, not by id, so that an end token which is also the pad token keeps its label.

    Raises:
      ValueError: a row is longer than ``length``, or rows differ and the tokenizer has no pad token.
    """
    longest = max(map(len, rows))
    if length is not None and longest > length:
        raise ValueError(f"a row has {longest} tokens, more than max_length {length}; pass truncation=True to cut it")
    width = length or longest
    width = width if multiple is None else -(-width // multiple) * multiple
    if tokenizer.pad_token_id is None and any(len(row) < width for row in rows):
        raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token, for instance to its eos_token")
    left = tokenizer.padding_side == "left"
    gaps = [(width - len(row), 0) if left else (0, width - len(row)) for row in rows]

    def stacked(arrays: Sequence[np.ndarray], value: int | None) -> np.ndarray:
        # A value of None is never used: no row has a gap then.
        return np.stack([np.pad(a, gap, constant_values=value or 0) for a, gap in zip(arrays, gaps, strict=True)]).astype(np.int64)

    inputs = {"input_ids": stacked(rows, tokenizer.pad_token_id), "attention_mask": stacked([np.ones(len(row)) for row in rows], 0)}
    return Inputs(inputs if labels is None else {**inputs, "labels": stacked(labels, IGNORE)})


def truncate_ids(ids: Int[np.ndarray, " S"], most: int, media_token_ids: Sequence[int], *, where: str) -> Int[np.ndarray, " T"]:
    """The first ``most`` ids.

    >>> truncate_ids(np.array([1, 2, 3]), 2, [9], where="row 0").tolist()
    [1, 2]

    Raises:
      ValueError: a placeholder of an image would be lost; the row is named.
    """
    lost = int(np.isin(ids[most:], media_token_ids).sum())
    if lost:
        raise ValueError(
            f"{where}: cutting its {len(ids)} tokens to {most} would lose {lost} image or video placeholders; raise max_seq_length, "
            "or make the image smaller (resize, or the processor's max_pixels)"
        )
    return ids[:most]
