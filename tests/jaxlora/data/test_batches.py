import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.data.batches import labelled_tokens, make_batch
from jaxlora.data.inputs import ModelValues, token_spans
from jaxlora.data.ladder import Shape
from jaxlora.data.positions import VisionValues

IMAGE = 3
VISION = VisionValues(image_token_id=IMAGE, video_token_id=4, patch_size=14, merge_size=2, patch_elements=6, mrope=True)
TEXT_MODEL, VISION_MODEL = ModelValues(pad_token_id=0), ModelValues(pad_token_id=0, vision=VISION)


def padded(rows, side="right"):
    width = max(map(len, rows))
    gap = [(0, width - len(r)) if side == "right" else (width - len(r), 0) for r in rows]
    ids = np.stack([np.pad(r, g) for r, g in zip(rows, gap, strict=True)])
    mask = np.stack([np.pad(np.ones(len(r), int), g) for r, g in zip(rows, gap, strict=True)])
    labels = np.where(mask == 1, ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def image_row(*grids):
    return np.concatenate([[7], *[[8, *[IMAGE] * (t * h * w // 4), 9] for t, h, w in grids]])


def with_images(rows, grids, side="right"):
    count = sum(t * h * w for t, h, w in grids)
    pixels = np.arange(count * 6, dtype=np.float32).reshape(count, 6)
    return {**padded(rows, side), "pixel_values": pixels, "image_grid_thw": np.array(grids)}


@given(st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=7), min_size=1, max_size=3))
def test_padding_side_does_not_matter(rows):
    rows = [np.array(r) for r in rows]
    right, left = (make_batch([padded(rows, side)], TEXT_MODEL, Shape(8), rows=3) for side in ("right", "left"))
    for a, b in ((right.input_ids, left.input_ids), (right.labels, left.labels), (right.position_ids, left.position_ids)):
        assert np.array_equal(a, b)


@given(st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=7), min_size=1, max_size=3))
def test_a_label_is_the_next_token(rows):
    batch = make_batch([padded([np.array(r) for r in rows])], TEXT_MODEL, Shape(8), rows=3)
    for b, row in enumerate(rows):
        assert batch.labels[0, b].tolist() == row[1:] + [-100] * (9 - len(row))


def test_only_labelled_tokens_count():
    inputs = padded([np.array([5, 6, 7, 8])])
    inputs["labels"] = np.array([[-100, -100, 7, 8]])
    assert labelled_tokens(make_batch([inputs], TEXT_MODEL, Shape(8), rows=1)) == 2


def test_packed_documents_restart_positions_and_train_nothing_across():
    ids = np.array([[5, 6, 7, 8, 9]])
    inputs = {"input_ids": ids, "labels": ids, "segment_lengths": [[2, 3]]}
    batch = make_batch([inputs], TEXT_MODEL, Shape(6), rows=1, segments=3)
    assert batch.position_ids[0, 0].tolist() == [0, 1, 0, 1, 2, 0]
    assert batch.labels[0, 0].tolist() == [6, -100, 8, 9, -100, -100]
    assert batch.segment_starts[0, 0].tolist() == [0, 2, 0]
    assert batch.segment_lengths[0, 0].tolist() == [2, 3, 0]


def test_a_short_window_is_filled_with_empty_micro_batches():
    batch = make_batch([padded([np.array([5, 6])])], TEXT_MODEL, Shape(4), rows=2, accumulate=3)
    assert batch.input_ids.shape == (3, 2, 4)
    assert (batch.labels[1:] == -100).all() and (batch.segment_lengths[1:] == 0).all()


def test_every_field_is_32_bit():
    batch = make_batch([with_images([image_row((1, 4, 4))], [(1, 4, 4)])], VISION_MODEL, Shape(8, 16), rows=1, images=1)
    kinds = {name: array.dtype for name, array in vars(batch).items() if array is not None}
    assert kinds == {name: np.float32 if name == "patches" else np.int32 for name in kinds}


@pytest.mark.parametrize("side", ["left", "right"])
def test_vision_index_points_at_the_features_of_the_rows_own_images(side):
    rows = [image_row((1, 2, 4)), np.array([5, 6]), image_row((1, 2, 2), (1, 4, 2))]
    batch = make_batch([with_images(rows, [(1, 2, 4), (1, 2, 2), (1, 4, 2)], side)], VISION_MODEL, Shape(9, 32), rows=3, images=4)
    assert batch.vision_index[0].tolist() == [
        [-1, -1, 0, 1, -1, -1, -1, -1, -1],
        [-1] * 9,
        [-1, -1, 2, -1, -1, 3, 4, -1, -1],
    ]
    assert batch.patch_segment_starts[0, 0].tolist() == [0, 8, 12, 0]
    assert batch.patch_segment_lengths[0, 0].tolist() == [8, 4, 8, 0]
    assert np.array_equal(batch.patches[0, 0, :20, 0], 6 * np.arange(20))


@pytest.mark.parametrize("kind", ["images", "video"])
def test_frames_that_are_alike_have_a_room_each_and_no_starts(kind):
    rows, count = [image_row((1, 2, 4)), np.array([5, 6]), image_row((1, 2, 4), (1, 4, 2))], 3
    inputs = with_images(rows, [(1, 2, 4), (1, 2, 4), (1, 4, 2)])
    if kind == "video":
        pixels = {"pixel_values_videos": np.zeros((16, 6), np.float32), "video_grid_thw": np.array([[2, 2, 4]])}
        inputs, count = {"input_ids": np.array([[8, 4, 4, 4, 4, 9]]), **pixels}, 2
    batch = make_batch([inputs], VISION_MODEL, Shape(9, 40, 8), rows=3, images=4)
    assert batch.patch_segment_starts is None
    assert batch.patch_segment_lengths[0, 0].tolist() == [8] * count + [0] * (5 - count)


@pytest.mark.parametrize(("patches", "grid", "frame"), [(40, (1, 2, 2), 8), (36, (1, 2, 4), 8), (40, (1, 2, 4), None)])
def test_frames_that_are_not_alike_or_do_not_fill_the_room_are_segments(patches, grid, frame):
    batch = make_batch([with_images([image_row(grid)], [grid])], VISION_MODEL, Shape(9, patches, frame), rows=1, images=2)
    assert batch.patch_segment_starts[0, 0].tolist() == [0, 0]
    assert batch.patch_segment_lengths[0, 0].tolist() == [4 if grid == (1, 2, 2) else 8, 0]


def test_each_data_shard_counts_its_own_features():
    rows = [image_row((1, 2, 2)), image_row((1, 2, 4))]
    batch = make_batch([with_images(rows, [(1, 2, 2), (1, 2, 4)])], VISION_MODEL, Shape(8, 8), rows=2, images=1, shards=2)
    assert batch.vision_index[0, :, 2].tolist() == [0, 0]
    assert batch.patches[0, 1, 0, 0] == 6 * 4
    assert batch.patch_segment_lengths[0].tolist() == [[4], [8]]


def test_a_video_has_one_patch_segment_a_frame():
    ids = np.array([[8, 4, 4, 4, 9]])
    pixels = np.zeros((12, 6), np.float32)
    inputs = {"input_ids": ids, "pixel_values_videos": pixels, "video_grid_thw": np.array([[3, 2, 2]])}
    batch = make_batch([inputs], VISION_MODEL, Shape(5, 12), rows=1, images=3)
    assert batch.patch_segment_starts[0, 0].tolist() == [0, 4, 8]
    assert batch.position_ids[0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_text_step_of_a_vision_model_has_no_patches():
    batch = make_batch([padded([np.array([5, 6])])], VISION_MODEL, Shape(4, 0), rows=1)
    assert batch.patches is None and batch.vision_index is None
    assert batch.position_ids.shape == (1, 3, 1, 4)


def test_given_position_ids_win():
    inputs = {"input_ids": np.array([[5, 6]]), "position_ids": np.array([[4, 9]])}
    assert make_batch([inputs], TEXT_MODEL, Shape(3), rows=1).position_ids.tolist() == [[[4, 9, 0]]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (padded([np.arange(5, 8), np.arange(5, 15)]), "row 1 has 10 tokens, room for 8"),
        ({"input_ids": np.array([[5, 6]]), "segment_lengths": [[1, 2]]}, "row 0: segment_lengths"),
        ({"input_ids": np.array([[5, 6]]), "segment_lengths": [[1, 1]]}, "row 0 has 2 segments, room for 1"),
        ({"input_ids": np.array([[5, 6]]), "atention_mask": None}, "did you mean 'attention_mask'"),
        (with_images([image_row((1, 4, 4))], [(1, 4, 4), (1, 2, 2)]), r"image 1 of grid \(1, 2, 2\)"),
        (with_images([np.array([5]), image_row((1, 4, 4))[:-3]], [(1, 4, 4)]), "row 1: the image at token 2 has 4 features"),
        (with_images([image_row((1, 4, 4)), image_row((1, 2, 2))], [(1, 4, 4)]), "row 1: token 2 is image placeholder"),
        (with_images([image_row((1, 4, 4))], [(1, 4, 4)]), r"rows \[0\] have 16 patches in 1 frames, room for 8 in 1"),
        (
            {"input_ids": np.array([[5, 3]]), "pixel_values": np.zeros((3, 6)), "image_grid_thw": np.array([[1, 2, 2]])},
            "pixel_values has shape",
        ),
    ],
)
def test_what_does_not_fit_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        make_batch([inputs], VISION_MODEL, Shape(8, 8), rows=2, images=1)


def test_a_mask_with_a_hole_is_refused_by_row():
    with pytest.raises(ValueError, match="row 1"):
        token_spans(np.zeros((2, 3), int), np.array([[1, 1, 1], [1, 0, 1]]))
