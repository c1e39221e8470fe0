"""What a trainer reads: rows with known sizes, and micro-batches of them with Hugging Face's names."""

import concurrent.futures
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxlora.data.batches import Batch, make_batch
from jaxlora.data.chat import IGNORE, ChatOptions, Encoded, encode
from jaxlora.data.inputs import ModelValues
from jaxlora.data.ladder import frame_size, ladder, padding_waste, smallest_that_holds
from jaxlora.data.order import DataState, next_rows
from jaxlora.data.packing import pack
from jaxlora.data.padding import pad_rows
from jaxlora.data.rows import read_row
from jaxlora.errors import raise_all


@runtime_checkable
class Source(Protocol):
    """Rows by number: ``lengths`` are (tokens, patches), ``frames`` counts images and video frames; ``segments`` is the most of any row."""

    lengths: list[tuple[int, int]]
    frames: list[int]
    segments: int

    def inputs(self, rows: Sequence[int]) -> Mapping[str, Any]:
        """One micro-batch."""
        ...


class TextSource:
    """Text rows, tokenised once; with ``pack_to``, several documents a row of at most that many tokens."""

    def __init__(self, encoded: Sequence[Encoded], tokenizer: Any, *, pack_to: int | None = None):
        if not any((row.labels[1:] != IGNORE).any() for row in encoded):
            raise ValueError(f"not one of the {len(encoded)} rows has a labelled token: all labels are -100 (masked, or cut off)")
        self.encoded, self._tokenizer, self._pack_to = list(encoded), tokenizer, pack_to
        if pack_to is None:
            self._rows = [(row.input_ids, row.labels, (len(row.input_ids),)) for row in encoded]
        else:
            packed = pack(encoded, pack_to)
            self._rows = [(row["input_ids"][0], row["labels"][0], tuple(row["segment_lengths"][0].tolist())) for row in packed]
        self.lengths = [(len(ids), 0) for ids, _, _ in self._rows]
        self.frames = [0] * len(self._rows)
        self.segments = max(len(lengths) for _, _, lengths in self._rows)

    def inputs(self, rows: Sequence[int]) -> Mapping[str, Any]:
        """Rows padded on one side, with the lengths of their documents."""
        ids, labels, lengths = zip(*(self._rows[i] for i in rows), strict=True)
        inputs = pad_rows(ids, self._tokenizer, labels=labels)
        inputs["segment_lengths"] = np.array([[*one, *[0] * (self.segments - len(one))] for one in lengths])
        return inputs

    def relabelled(self, labels: Sequence[np.ndarray]) -> "TextSource":
        """The same rows with other labels; rows that are left without a target are dropped."""
        rows = [Encoded(input_ids=row.input_ids, labels=new) for row, new in zip(self.encoded, labels, strict=True)]
        return TextSource([row for row in rows if (row.labels[1:] != IGNORE).any()], self._tokenizer, pack_to=self._pack_to)


class CollatedSource:
    """Rows that a collator turns into micro-batches when they are needed: images are decoded then."""

    segments = 1

    def __init__(self, rows: Sequence[Any], collator: Any):
        self._rows, self._collator = rows, collator
        sizes = [collator.measure(rows[i], where=f"row {i}") for i in range(len(rows))]
        self.lengths = [(tokens, patches) for tokens, patches, _ in sizes]
        self.frames = [frames for _, _, frames in sizes]

    def inputs(self, rows: Sequence[int]) -> Mapping[str, Any]:
        """What the collator makes of these rows."""
        return self._collator([self._rows[i] for i in rows])


def encode_rows(
    rows: Sequence[Any], tokenizer: Any, options: ChatOptions, *, max_length: int | None, text_field: str, formatting: Any
) -> list[Encoded]:
    """Tokenises text rows; longer ones are cut on the right at ``max_length``.

    Raises:
      ValueError: an empty dataset, or every row that cannot be read, at once.
    """
    if not len(rows):
        raise ValueError("the dataset is empty")
    encoded, faults = [], []
    for i in range(len(rows)):
        row = rows[i] if formatting is None else formatting(rows[i])
        try:
            found = encode(read_row(row, text_field=text_field, where=f"row {i}"), tokenizer, options, where=f"row {i}")
        except (ValueError, TypeError) as error:
            faults.append(str(error))
            continue
        encoded.append(Encoded(input_ids=found.input_ids[:max_length], labels=found.labels[:max_length]))
    raise_all(f"{len(faults)} of {len(rows)} rows cannot be read", faults)
    return encoded


class Batches:
    """Optimizer steps of a source, in a resumable order, laid out in few shapes; prepared one ahead in a thread."""

    def __init__(
        self, source: Source, values: ModelValues, *, rows: int, accumulate: int, seed: int, shuffle: bool = True, drop_last: bool = False
    ):
        self.source, self.values, self.rows, self.accumulate = source, values, rows, accumulate
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        frame = frame_size(source.lengths, source.frames)
        self.shapes = ladder(source.lengths, rows=rows, shards_per_step=accumulate, frame=frame)
        self.waste = padding_waste(self.shapes, source.lengths, rows=rows, shards_per_step=accumulate)
        # A static size too, so it is the most that any micro-batch of any order can have.
        self.frames = sum(sorted(source.frames)[-rows:])

    def __iter__(self) -> Iterator[Batch]:
        return self.starting(0)

    def starting(self, step: int, stop: int | None = None) -> Iterator[Batch]:
        """The steps from that one on, up to ``stop`` or for ever."""
        with concurrent.futures.ThreadPoolExecutor(1) as worker:
            plans = itertools.islice(self._plans(step), None if stop is None else stop - step)
            ahead = [worker.submit(self.batch, plan) for plan in itertools.islice(plans, 1)]
            while ahead:
                following = [worker.submit(self.batch, plan) for plan in itertools.islice(plans, 1)]
                yield ahead[0].result()
                ahead = following

    def batch(self, rows: Sequence[int]) -> Batch:
        """One optimizer step of these rows, in the smallest shape that holds all its micro-batches."""
        groups = [rows[at : at + self.rows] for at in range(0, len(rows), self.rows)]
        lengths = self.source.lengths
        tokens = max(lengths[i][0] for i in rows)
        patches = max(sum(lengths[i][1] for i in group) for group in groups)
        shape = smallest_that_holds(self.shapes, tokens, patches, rows=self.rows)
        return make_batch([self.source.inputs(group) for group in groups], self.values, shape, rows=self.rows, **self._sizes())

    def largest(self) -> Batch:
        """An empty step of the largest shape."""
        return make_batch([], self.values, self.shapes[-1], rows=self.rows, **self._sizes())

    def _sizes(self) -> dict[str, Any]:
        return {"segments": self.source.segments, "images": self.frames, "accumulate": self.accumulate}

    def epoch(self, step: int) -> float:
        """How many epochs ``step`` steps are."""
        return step / self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch; the last may be short."""
        n, per_step = len(self.source.lengths), self.rows * self.accumulate
        return max(n // per_step if self.drop_last else -(-n // per_step), 1)

    def state(self, step: int) -> DataState:
        """How far the data is read after ``step`` steps."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return DataState(epoch, within * self.rows * self.accumulate)

    def _plans(self, step: int) -> Iterator[list[int]]:
        state, per_step = self.state(step), self.rows * self.accumulate
        while True:
            rows, state = next_rows(state, len(self.source.lengths), per_step, self.seed, shuffle=self.shuffle)
            if len(rows) == per_step or not self.drop_last or len(self.source.lengths) < per_step:
                yield rows.tolist()
