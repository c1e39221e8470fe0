import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.data.batches import make_batch
from jaxlora.data.chat import Encoded
from jaxlora.data.inputs import ModelValues
from jaxlora.data.ladder import Shape
from jaxlora.data.packing import first_fit_decreasing, pack

LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=40)


def documents(lengths):
    ids = np.split(np.arange(5, 5 + sum(lengths)), np.cumsum(lengths)[:-1])
    return [Encoded(input_ids=piece, labels=piece.copy()) for piece in ids]


@given(LENGTHS)
def test_every_row_is_in_exactly_one_bin_that_holds_it(lengths):
    bins = first_fit_decreasing(lengths, 32)
    assert sorted(row for members in bins for row in members) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in members) <= 32 for members in bins)


@given(LENGTHS)
def test_at_most_one_bin_is_half_empty(lengths):
    # Otherwise first fit would have put one's rows into the other.
    assert sum(2 * sum(lengths[row] for row in members) <= 32 for members in first_fit_decreasing(lengths, 32)) <= 1


@given(LENGTHS)
def test_packing_loses_no_token_and_no_label_but_the_first_of_a_document(lengths):
    packs = pack(documents(lengths), 32)
    assert sorted(np.concatenate([p["input_ids"][0] for p in packs])) == list(range(5, 5 + sum(lengths)))
    assert sum((p["labels"] != -100).sum() for p in packs) == sum(n - 1 for n in lengths)


@given(LENGTHS)
def test_a_packed_batch_trains_each_token_after_its_own_predecessor(lengths):
    packs = pack(documents(lengths), 32)
    batch = make_batch(packs, ModelValues(pad_token_id=0), Shape(32), rows=1, segments=32)
    # Ids count up through each document, so the next token is always the id plus one.
    trained = batch.labels != -100
    assert trained.sum() == sum(n - 1 for n in lengths)
    assert (batch.labels[trained] == batch.input_ids[trained] + 1).all()


def test_a_row_longer_than_the_pack_is_refused():
    with pytest.raises(ValueError, match="row 1 has 9 tokens"):
        first_fit_decreasing([3, 9], 8)
