import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.data.order import DataState, next_rows, row_order


def read(state, n, count, seed, until):
    rows = []
    for _ in range(until * n):
        if state.epoch < until:
            taken, state = next_rows(state, n, count, seed)
            rows += taken.tolist()
    assert state.epoch == until
    return rows


@given(st.integers(1, 50), st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_an_epoch_reads_every_row_once(n, seed, epoch):
    assert sorted(row_order(n, seed, epoch).tolist()) == list(range(n))


@given(st.integers(1, 30), st.integers(1, 7), st.integers(0, 99), st.integers(0, 20))
def test_a_resumed_run_reads_what_the_straight_run_reads(n, count, seed, steps_before):
    straight = read(DataState(), n, count, seed, until=2)
    state, before = DataState(), []
    for _ in range(steps_before):
        if state.epoch < 2:
            taken, state = next_rows(state, n, count, seed)
            before += taken.tolist()
    after = read(DataState(**vars(state)), n, count, seed, until=2)
    assert before + after == straight


def test_seed_and_epoch_change_the_order():
    orders = {tuple(row_order(20, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_the_order_is_that_of_philox_words():
    words = np.random.Philox(key=np.array([7, 2], np.uint64)).random_raw(9)
    assert row_order(9, 7, 2).tolist() == sorted(range(9), key=lambda i: words[i])


def test_a_state_of_another_dataset_is_refused():
    with pytest.raises(ValueError, match="was the dataset changed"):
        next_rows(DataState(0, 10), n=5, count=2, seed=0)
