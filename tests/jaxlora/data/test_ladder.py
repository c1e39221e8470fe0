import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.data.ladder import Shape, frame_size, ladder, padding_waste, smallest_that_holds

LENGTHS = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 400).map(lambda n: 4 * n)), min_size=1, max_size=40)
ROWS = st.integers(1, 3)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, ROWS, st.integers(1, 4), st.integers(1, 8))
def test_a_ladder_has_at_most_the_rungs_asked_for(lengths, rows, groups, most):
    assert 1 <= len(ladder(lengths, rows=rows, shards_per_step=groups, most=most)) <= most


@settings(max_examples=50, deadline=None)
@given(LENGTHS, ROWS)
def test_the_largest_rung_holds_the_worst_step(lengths, rows):
    worst_patches = sum(sorted(v for _, v in lengths)[-rows:])
    assert ladder(lengths, rows=rows)[-1].holds(max(s for s, _ in lengths), worst_patches)


@settings(max_examples=50, deadline=None)
@given(LENGTHS)
def test_more_rungs_never_waste_more(lengths):
    wastes = [padding_waste(ladder(lengths, most=most), lengths) for most in (1, 2, 4, 8)]
    assert all(later <= earlier + 1e-9 for earlier, later in zip(wastes, wastes[1:], strict=False))


@settings(max_examples=50, deadline=None)
@given(LENGTHS)
def test_sizes_are_multiples_that_a_merge_of_two_divides(lengths):
    for shape in ladder(lengths):
        assert shape.tokens % 16 == 0 and shape.patches % 16 == 0
        assert shape.tokens % 128 == 0 or max(s for s, _ in lengths) <= 512


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 900), st.integers(0, 5)), min_size=1, max_size=20), st.integers(1, 300), ROWS)
def test_frames_that_are_alike_fill_the_patches_of_every_rung(rows, frame, of_a_step):
    lengths, frames = [(tokens, frame * count) for tokens, count in rows], [count for _, count in rows]
    assert frame_size(lengths, frames) == (frame if any(frames) else None)
    if any(frames):
        shapes = ladder(lengths, rows=of_a_step, frame=frame)
        assert all(shape.patches % frame == 0 and shape.frame == frame for shape in shapes)


def test_two_lengths_get_two_rungs():
    assert ladder([(100, 0)] * 50 + [(4000, 1000)] * 50, rows=1) == (Shape(128, 0), Shape(4096, 1008))


def test_waste_is_the_padded_share():
    # 100 + 300 tokens in two rows of 512.
    assert padding_waste([Shape(512)], [(100, 0), (300, 0)]) == pytest.approx(1 - 400 / 1024)


def test_the_cheapest_shape_that_fits_is_taken():
    shapes = [Shape(128, 64), Shape(256, 0), Shape(512, 512)]
    assert smallest_that_holds(shapes, 100, 0) == Shape(128, 64)
    assert smallest_that_holds(shapes, 100, 65) == Shape(512, 512)


def test_a_step_that_nothing_holds_is_refused():
    with pytest.raises(ValueError, match="no shape holds 600 tokens"):
        smallest_that_holds([Shape(512)], 600)


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        ladder([])
