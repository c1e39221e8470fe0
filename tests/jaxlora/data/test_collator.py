import types

import numpy as np
import pytest
from PIL import Image

from jaxlora.api.collator import UnslothVisionDataCollator, VisionDataCollator
from jaxlora.data.batches import make_batch
from jaxlora.data.collate import media_ids
from jaxlora.data.inputs import ModelValues
from jaxlora.data.ladder import Shape
from jaxlora.data.positions import VisionValues
from jaxlora.data.processors import load_processor
from jaxlora.data.turns import takes_parts
from jaxlora.recipes.tiny_tokenizer import make_tokenizer
from tests.jaxlora.data import processor_reference


@pytest.fixture
def processor(tmp_path):
    return load_processor(make_tokenizer(tmp_path, "qwen2_vl"), "qwen2_vl")


def model(max_seq_length=2048, **vision):
    return types.SimpleNamespace(max_seq_length=max_seq_length, config={"vision_config": {"patch_size": 14, **vision}})


def picture(width=90, height=60):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def row(*images, question="What is the total?", answer="The total is 41.70."):
    content = [*[{"type": "image", "image": image} for image in images], {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]}


def text_of(processor, batch, i):
    labels = batch["labels"][i]
    return processor.decode(labels[labels != -100])


def collator(processor, stand_in=None, **options):
    return UnslothVisionDataCollator(stand_in or model(), processor, **{"resize": "max", **options})


MIXED = [row(), row(picture()), row(picture(), picture(200, 100)), row(picture(60, 300))]


def test_both_names_are_one_class():
    assert VisionDataCollator is UnslothVisionDataCollator


def test_text_only_rows_have_no_pixels(processor):
    assert set(collator(processor)([row(), row()])) == {"input_ids", "attention_mask", "labels", "mm_token_type_ids"}


def test_mixed_rows_have_one_placeholder_a_feature(processor):
    batch = collator(processor)(MIXED)
    features = batch["image_grid_thw"].prod(1) // 4
    per_row = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert per_row.tolist() == [0, features[0], features[1] + features[2], features[3]]
    assert batch["pixel_values"].shape == (batch["image_grid_thw"].prod(1).sum(), 1176)
    assert np.array_equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == processor.image_token_id)


def test_by_default_all_text_is_trained_and_media_and_padding_are_not(processor):
    batch = collator(processor)(MIXED)
    masked = (batch["attention_mask"] == 0) | np.isin(batch["input_ids"], media_ids(processor.tokenizer))
    assert np.array_equal(batch["labels"], np.where(masked, -100, batch["input_ids"]))


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_the_end_of_a_turn_is_trained_whatever_the_pad_token(processor, pad_is_end):
    if pad_is_end:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    batch = collator(processor, train_on_responses_only=True)(MIXED)
    assert [text_of(processor, batch, i) for i in range(4)] == ["The total is 41.70.<|im_end|>"] * 4


def test_left_padding_gives_the_same_batch_record(processor):
    values = ModelValues(
        pad_token_id=0, vision=VisionValues(image_token_id=processor.image_token_id, patch_size=14, merge_size=2, patch_elements=1176)
    )
    made = []
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        inputs = collator(processor)(MIXED)
        assert bool(inputs["attention_mask"][0, 0]) == (side == "right")
        made.append(make_batch([inputs], values, Shape(512, 1024), rows=4, images=4))
    assert all(np.array_equal(getattr(made[0], name), getattr(made[1], name)) for name in vars(made[0]))


@pytest.mark.parametrize("options", [{}, {"resize": 64}, {"resize": (56, 84)}, {"max_seq_length": 400}])
@pytest.mark.parametrize("which", range(4))
def test_a_row_measures_what_it_becomes(processor, options, which):
    made = collator(processor, **options)
    batch = made([MIXED[which]])
    frames = sum(t for t, _, _ in batch.get("image_grid_thw", ()))
    assert made.measure(MIXED[which]) == (batch["input_ids"].shape[1], len(batch.get("pixel_values", ())), frames)


def test_truncation_through_an_image_is_refused_by_row_in_both_passes(processor):
    made = collator(processor, max_seq_length=24)
    with pytest.raises(ValueError, match="row 1: cutting its .* tokens to 24 would lose .* placeholders"):
        made([row(), row(picture(200, 200))])
    with pytest.raises(ValueError, match="row 7: cutting"):
        made.measure(row(picture(200, 200)), where="row 7")


def test_the_models_length_cuts_text_and_its_labels(processor):
    batch = collator(processor, model(max_seq_length=20))([row(answer="a b c " * 30)])
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 20)


def test_a_length_that_is_no_int_cuts_nothing(processor):
    batch = collator(processor, model(max_seq_length=20), max_seq_length=False)([row(answer="a b c " * 30)])
    assert batch["input_ids"].shape[1] > 60


def test_image_paths_are_read_inside_their_root_and_nowhere_else(processor, tmp_path):
    (tmp_path / "images").mkdir()
    for folder in (tmp_path, tmp_path / "images"):
        picture(56, 84).save(folder / "scan.png")
    made = collator(processor, image_root=tmp_path / "images")
    batch = made([row("scan.png")])
    assert batch["image_grid_thw"].tolist() == [[1, 6, 4]]
    assert made.measure(row("scan.png"))[1:] == (24, 1)
    for outside in ("../scan.png", str(tmp_path / "scan.png")):
        for call in (lambda path: made([row(path)]), lambda path: made.measure(row(path))):
            with pytest.raises(ValueError, match="image 0: path .* leaves the image root"):
                call(outside)


def test_images_come_from_their_column_where_there_is_one(processor):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "x"}]
    batch = collator(processor)([{"messages": messages, "images": [picture(56, 84)]}])
    assert batch["image_grid_thw"].tolist() == [[1, 6, 4]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": row()["messages"], "images": [picture()]}, "row 0: 1 images more than placeholders"),
        (row(question="?", answer="<|image_pad|>"), "row 0: more image placeholders in the text than images"),
        (row("no-such.png"), "row 0, image 0: not a readable"),
        (row(picture(3, 900)), "row 0, image 0 of 3 x 900 pixels"),
        ({"messages": []}, "row 0: expected a list of messages"),
    ],
)
def test_a_row_that_cannot_be_made_is_refused_by_name(processor, given, message):
    with pytest.raises(ValueError, match=message):
        collator(processor)([given])


def test_an_image_token_typed_by_a_user_is_text(processor):
    batch = collator(processor)([row(picture(), question="<|image_pad|>?")])
    assert (batch["input_ids"] == processor.image_token_id).sum() == batch["image_grid_thw"].prod() // 4


def test_no_rows_are_refused(processor):
    with pytest.raises(ValueError, match="no rows"):
        collator(processor)([])


@pytest.mark.parametrize(
    ("options", "vision", "size", "expected"),
    [
        ({"resize": "min"}, {"image_size": 112}, (224, 112), (112, 56)),
        ({"resize": "min"}, {"image_size": [84, 56]}, (20, 200), (84, 56)),
        ({"resize": "min"}, {}, (1024, 512), (512, 256)),
        ({"resize": "max"}, {"image_size": 112}, (224, 112), (224, 112)),
        ({"resize": 112, "resize_dimension": 1}, {}, (112, 224), (56, 112)),
        ({"resize": 100, "snap_to_patch_size": True}, {}, (224, 112), (112, 56)),
        ({"resize": (140, 84)}, {}, (224, 112), (140, 84)),
    ],
)
def test_the_resize_options(processor, options, vision, size, expected):
    batch = UnslothVisionDataCollator(model(**vision), processor, **options)([row(picture(*size))])
    assert batch["image_grid_thw"][0].tolist() == list(processor.grid_of(expected))


@pytest.mark.parametrize(
    ("options", "error"), [({"resize": "mid"}, TypeError), ({"resize_dimension": 2}, TypeError), ({"resize": -5}, TypeError)]
)
def test_a_wrong_option_is_refused(processor, options, error):
    with pytest.raises(error):
        UnslothVisionDataCollator(model(), processor, **options)


def test_a_tokenizer_is_no_processor(processor):
    with pytest.raises(TypeError, match="only for image models"):
        UnslothVisionDataCollator(model(), processor.tokenizer)


def test_marker_strings_mask_as_the_template_does_but_for_the_newline(processor):
    markers = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    batch = collator(processor, train_on_responses_only=True, **markers)(MIXED)
    assert [text_of(processor, batch, i) for i in range(4)] == ["The total is 41.70.<|im_end|>\n"] * 4


def test_a_marker_of_another_template_is_named(processor):
    markers = {"instruction_part": "<|im_start|>user\n", "response_part": "<start_of_turn>model\n"}
    with pytest.raises(ValueError, match="'<start_of_turn>model.n' matched in 0 of 1 rows"):
        collator(processor, train_on_responses_only=True, **markers)([row()])


def test_one_marker_alone_is_refused(processor):
    with pytest.raises(ValueError, match="come together"):
        collator(processor, train_on_responses_only=True, instruction_part="<|im_start|>user\n")


@pytest.mark.parametrize("only_completion", [True, False])
def test_prompt_and_completion_columns(processor, only_completion):
    messages = row(picture())["messages"]
    batch = collator(processor, completion_only_loss=only_completion)([{"prompt": messages[:1], "completion": messages[1:]}])
    text = text_of(processor, batch, 0)
    assert text.endswith("The total is 41.70.<|im_end|>\n")
    assert ("What is the total?" in text) != only_completion


def test_formatting_func_is_applied_first(processor):
    batch = collator(processor, formatting_func=lambda given: row(question=given["q"]))([{"q": "How many apples?"}])
    assert "How many apples?" in text_of(processor, batch, 0)


def test_lengths_are_rounded_up_and_another_ignore_index_is_used(processor):
    batch = collator(processor, pad_to_multiple_of=64, ignore_index=-1)([row()])
    assert batch["input_ids"].shape[1] % 64 == 0
    assert (batch["labels"][batch["attention_mask"] == 0] == -1).all() and -100 not in batch["labels"]


def test_text_parts_are_joined_for_a_template_of_strings(processor):
    processor.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}<|im_end|>{% endfor %}"
    assert not takes_parts(processor.tokenizer, "assistant")
    batch = collator(processor)([row()])
    assert text_of(processor, batch, 0) == "user:What is the total?<|im_end|>assistant:The total is 41.70.<|im_end|>"


def test_videos_are_lists_of_frames(processor):
    content = [{"type": "video", "video": [picture()] * 3}, {"type": "text", "text": "?"}]
    batch = collator(processor)([[{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]])
    assert batch["video_grid_thw"][0, 0] == 2
    assert (batch["input_ids"] == processor.video_token_id).sum() == batch["video_grid_thw"].prod() // 4


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_the_times_of_a_video_reach_the_model(model_type, tmp_path):
    processor = load_processor(processor_reference.write_folder(tmp_path, model_type), model_type)
    content = [{"type": "text", "text": "look:"}, {"type": "video", "video": [picture(96, 64)] * 3, "fps": 4}]
    films = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    made = collator(processor)
    batch = made([films])
    assert made.measure(films)[:2] == (batch["input_ids"].shape[1], len(batch["pixel_values_videos"]))
    text = processor.batch_decode(batch["input_ids"])[0]
    if model_type == "qwen2_5_vl":
        assert batch["second_per_grid_ts"].tolist() == [0.5]
    else:
        assert "look:<0.1 seconds><|vision_start|>" in text and "<|vision_end|><0.5 seconds><|vision_start|>" in text
