"""Several short documents in one row, so that little of a step is padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlora.data.chat import Encoded
from jaxlora.data.padding import IGNORE
from jaxlora.errors import raise_all


def first_fit_decreasing(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Bins of row indices whose lengths add up to at most ``size``: each row, longest first, goes into the first bin with room.

    Deterministic: of equal rows the earlier one goes first. At most 11/9 of the best possible number of bins, plus one.

    >>> first_fit_decreasing([3, 5, 2, 4], 7)
    [[1, 2], [3, 0]]

    Raises:
      ValueError: rows longer than ``size``; nothing is cut.
    """
    raise_all(f"rows do not fit packs of {size} tokens", [f"row {i} has {n} tokens" for i, n in enumerate(lengths) if n > size])
    bins: list[list[int]] = []
    room: list[int] = []
    for row in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        found = next((b for b, left in enumerate(room) if left >= lengths[row]), None)
        if found is None:
            bins.append([row])
            room.append(size - lengths[row])
        else:
            bins[found].append(row)
            room[found] -= lengths[row]
    return bins


def pack(rows: Sequence[Encoded], size: int) -> list[dict[str, Any]]:
    """Rows with Hugging Face's names of at most ``size`` tokens: input_ids [1, n], labels [1, n], segment_lengths [1, M].

    A document's first label is -100: the token before it belongs to another document, which must not predict it.

    >>> row = Encoded(input_ids=np.array([5, 6]), labels=np.array([5, 6]))
    >>> pack([row, row], 4)[0]["labels"].tolist()
    [[-100, 6, -100, 6]]
    """
    packed = []
    for members in first_fit_decreasing([len(row.input_ids) for row in rows], size):
        labels = [np.concatenate([[IGNORE], rows[i].labels[1:]])[: len(rows[i].labels)] for i in members]
        packed.append(
            {
                "input_ids": np.concatenate([rows[i].input_ids for i in members])[None],
                "labels": np.concatenate(labels)[None].astype(np.int64),
                "segment_lengths": np.array([[len(rows[i].input_ids) for i in members]], np.int64),
            }
        )
    return packed
