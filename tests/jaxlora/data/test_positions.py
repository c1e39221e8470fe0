import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.data.positions import (
    VisionRun,
    VisionValues,
    find_runs,
    mrope_positions,
    patch_positions,
    rope_delta,
    window_order,
    window_room,
)

IMAGE, VIDEO, START, END, TEXT = 3, 4, 5, 6, 9


def values(**changes):
    base = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "patch_size": 14, "merge_size": 2}
    return VisionValues(**{**base, "patch_elements": 1176, "mrope": True, **changes})


def video_prompt():
    return np.array([TEXT, START, *[VIDEO] * 24, END, TEXT, TEXT])


# The vectors were made by transformers 4.49, 4.57 and 5.23 for this prompt; "reference" is the original Qwen code's.
@pytest.mark.parametrize(
    ("advance", "tokens_per_second", "seconds", "times", "tail", "delta"),
    [
        ("reference", None, 1.0, [2, 3, 4, 5, 6, 7], [8, 9, 10], -18),
        ("hf5", None, 1.0, [2, 3, 4, 5, 6, 7], [4, 5, 6], -21),
        ("reference", 4.0, 0.5, [2, 4, 6, 8, 10, 12], [13, 14, 15], -13),
        ("hf5", 4.0, 0.5, [2, 4, 6, 8, 10, 12], [4, 5, 6], -16),
    ],
)
def test_a_video_has_the_published_positions(advance, tokens_per_second, seconds, times, tail, delta):
    v, ids = values(mrope_advance=advance, tokens_per_second=tokens_per_second), video_prompt()
    runs = find_runs(ids, iter(()), iter([((6, 4, 4), seconds)]), v)
    positions = mrope_positions(len(ids), runs, v)
    assert positions[0].tolist() == [0, 1, *np.repeat(times, 4).tolist(), *tail]
    assert positions[1].tolist() == [0, 1, *[2, 2, 3, 3] * 6, *tail]
    assert positions[2].tolist() == [0, 1, *[2, 3, 2, 3] * 6, *tail]
    assert rope_delta(positions) == delta


@pytest.mark.parametrize("advance", ["reference", "hf5"])
def test_an_image_has_the_published_positions(advance):
    ids = np.array([TEXT] * 3 + [START] + [IMAGE] * 4 + [END, TEXT, TEXT])
    v = values(mrope_advance=advance)
    positions = mrope_positions(len(ids), find_runs(ids, iter([((1, 4, 4), 1.0)]), iter(()), v), v)
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 6, 7, 8]
    assert positions[1].tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 7, 8]
    assert positions[2].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert rope_delta(positions) == -2


def test_patches_are_in_merge_block_order():
    assert patch_positions((1, 4, 4), 2)[:9].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 0]]


def test_every_frame_repeats_the_patch_positions():
    one, three = patch_positions((1, 2, 6), 2), patch_positions((3, 2, 6), 2)
    assert np.array_equal(three, np.concatenate([one] * 3))


def test_adjacent_images_are_told_apart_by_their_grids():
    ids = np.array([IMAGE] * 3)
    runs = find_runs(ids, iter([((1, 2, 2), 1.0), ((1, 2, 4), 1.0)]), iter(()), values())
    assert runs == [VisionRun(start=0, grid=(1, 2, 2), features=1), VisionRun(start=1, grid=(1, 2, 4), features=2)]


def test_a_cut_image_is_refused_with_both_counts():
    with pytest.raises(ValueError, match=r"has 4 features .* but 3 placeholders"):
        find_runs(np.array([TEXT, IMAGE, IMAGE, IMAGE]), iter([((1, 4, 4), 1.0)]), iter(()), values())


def test_a_placeholder_without_an_image_is_refused():
    with pytest.raises(ValueError, match="no image is left"):
        find_runs(np.array([TEXT, IMAGE]), iter(()), iter(()), values())


def test_windows_have_the_published_order():
    """As transformers orders 20 x 12 patches in windows of 4 x 4 merged cells."""
    order, lengths = window_order((1, 20, 12), values(window=4))
    assert order[:25].tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18, 19, 20, 21, 4, 5, 10, 11, 16, 17, 22, 23, 24]
    assert np.cumsum([0, *lengths]).tolist() == [0, 64, 96, 160, 192, 224, 240]


def test_no_window_crosses_a_frame():
    order, lengths = window_order((3, 6, 10), values(window=4))
    assert sorted(order.tolist()) == list(range(45))
    assert all(np.array_equal(order[i : i + 15] // 15, np.full(15, i // 15)) for i in (0, 15, 30))
    assert np.cumsum(lengths).tolist()[1::2] == [60, 120, 180]


@given(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4))
def test_there_is_room_for_every_window(sizes):
    grids = [(t, 2 * h, 2 * w) for t, h, w in sizes]
    needed = sum(len(window_order(grid, values(window=4))[1]) for grid in grids)
    patches, frames = sum(t * h * w for t, h, w in grids), sum(grid[0] for grid in grids)
    assert window_room(needed, patches, frames, values(window=4)) >= needed
