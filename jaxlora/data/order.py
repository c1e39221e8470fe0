"""The order of rows, keyed by (seed, epoch), and the record that says how far a run has read."""

import dataclasses

import numpy as np

from jaxlora.typing import Int


def row_order(n: int, seed: int, epoch: int, *, shuffle: bool = True) -> Int[np.ndarray, " N"]:
    """The order in which epoch ``epoch`` reads ``n`` rows.

    Sorted by Philox words, which numpy promises never to change (a Generator's ``permutation`` may): a run resumes under another numpy.

    >>> sorted(row_order(4, seed=0, epoch=1).tolist())
    [0, 1, 2, 3]
    """
    if not shuffle:
        return np.arange(n)
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable")


@dataclasses.dataclass(frozen=True)
class DataState:
    """How far a run has read: rows of ``epoch`` before ``position`` are done. A checkpoint stores it; nothing else is needed to resume."""

    epoch: int = 0
    position: int = 0


def next_rows(state: DataState, n: int, count: int, seed: int, *, shuffle: bool = True) -> tuple[Int[np.ndarray, " B"], DataState]:
    """The next ``count`` row indices of the epoch (fewer at its end: a window never spans two epochs), and the state after them.

    >>> rows, state = next_rows(DataState(0, 2), n=3, count=2, seed=0, shuffle=False)
    >>> rows.tolist(), state
    ([2], DataState(epoch=1, position=0))

    Raises:
      ValueError: no rows, or a state that points behind the last one.
    """
    if n < 1 or count < 1 or not 0 <= state.position < n:
        raise ValueError(f"{state} does not fit {n} rows read {count} at a time; was the dataset changed since the checkpoint?")
    rows = row_order(n, seed, state.epoch, shuffle=shuffle)[state.position : state.position + count]
    position = state.position + len(rows)
    return rows, DataState(state.epoch + 1, 0) if position == n else DataState(state.epoch, position)
