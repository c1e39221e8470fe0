"""Llama 3.2 Vision's processor against transformers' own, which runs here because it needs no torch."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import MllamaProcessor as TheirProcessor

from jaxlora.data.batches import make_batch
from jaxlora.data.collate import CollateOptions, collate, measure_row
from jaxlora.data.inputs import ModelValues
from jaxlora.data.ladder import Shape
from jaxlora.data.positions import VisionValues
from jaxlora.data.processors import load_processor
from jaxlora.data.tiles import cross_attention_mask
from jaxlora.recipes.tiny_tokenizer import make_tokenizer
from tests.jaxlora.data.processor_reference import picture

ONE = "<|image|>"
SIZES = [
    (90, 60),
    (29, 110),
    (300, 40),
    (1, 150),
    (150, 1),
    (56, 56),
    (57, 55),
    (3, 3),
    (64, 1000),
    (60, 160),
    (455, 231),
    (17, 17),
    (640, 480),
]
TILES = (1, 1, 2, 3, 4, 2, 4, 3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = make_tokenizer(tmp_path_factory.mktemp("mllama"), "mllama")
    config = json.loads((made / "preprocessor_config.json").read_text())
    (made / "preprocessor_config.json").write_text(json.dumps({**config, "size": {"height": 56, "width": 56}}))
    return made


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(folder, "mllama")


def theirs_of(folder, **given):
    made = TheirProcessor(MllamaImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))(
        **given, return_tensors="np"
    )
    return {name: np.asarray(value) for name, value in made.items()}


def vision(processor):
    return VisionValues(image_token_id=processor.image_token_id, patch_size=14, patch_elements=588, grid=(4, 4, 4), tiles=TILES)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixel_values_ratios_and_ids_of_a_row_are_those_of_transformers(folder, processor, size):
    theirs = theirs_of(folder, images=picture(*size), text=ONE)
    ours = processor(images=picture(*size), text=ONE)
    assert ours["pixel_values"].dtype == theirs["pixel_values"].dtype == np.float32
    assert sorted(ours) == sorted(theirs) and all(np.array_equal(array, theirs[name]) for name, array in ours.items())
    assert (ours["aspect_ratio_mask"].sum(-1) == np.take(TILES, ours["aspect_ratio_ids"])).all()


def test_the_sizes_meet_every_number_of_tiles(processor):
    ratios = [int(processor.image_inputs([picture(*size)])["aspect_ratio_ids"][0, 0]) for size in SIZES]
    assert {TILES[ratio] for ratio in ratios} == {1, 2, 3, 4}


def test_the_released_size_gives_the_pixels_of_transformers(tmp_path):
    folder = make_tokenizer(tmp_path, "mllama")
    theirs = theirs_of(folder, images=picture(700, 231), text=f"{ONE}a boat")
    ours = load_processor(folder, "mllama")(images=picture(700, 231), text=f"{ONE}a boat")
    assert ours["pixel_values"].shape == (1, 1, 4, 3, 560, 560)
    assert sorted(ours) == sorted(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in theirs)


TEXTS = [ONE, f"What is it?{ONE}", f"{ONE}{ONE} and {ONE} what", f"a{ONE} b {ONE}{ONE}", "no image"]


@pytest.mark.parametrize("text", TEXTS)
def test_what_a_token_sees_is_what_transformers_says(folder, processor, text):
    images = [picture(30 + 50 * i, 90) for i in range(text.count(ONE))] or None
    theirs = theirs_of(folder, images=images, text=text)
    ours = processor(images=images, text=text)
    assert sorted(ours) == sorted(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    if images:
        tiles = np.take(TILES, theirs["aspect_ratio_ids"])
        own = cross_attention_mask([theirs["input_ids"][0]], tiles.tolist(), processor.image_token_id, 4)
        assert np.array_equal(own, theirs["cross_attention_mask"])
        make_batch([ours], ModelValues(pad_token_id=0, vision=vision(processor)), Shape(64, 256), rows=1)


def chat(*contents):
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant", "user", "assistant"), contents, strict=False)]


def test_a_conversation_becomes_the_inputs_of_transformers(folder, processor):
    user = [{"type": "image", "image": picture(9, 7)}, {"type": "text", "text": "what is it?"}]
    made = processor.apply_chat_template(chat(user), tokenize=True, add_generation_prompt=True)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    text = f"<|begin_of_text|>{header.format('user')}{ONE}what is it?<|eot_id|>{header.format('assistant')}"
    theirs = theirs_of(folder, images=picture(9, 7), text=text, add_special_tokens=False)
    assert all(np.array_equal(made[name], theirs[name]) for name in theirs)


def test_collated_rows_are_those_of_transformers_with_labels_on_text(folder, processor):
    image = {"type": "image"}
    parts = [{"type": "text", "text": "look"}, {**image, "image": picture(90, 7)}, {"type": "text", "text": "what is it?"}]
    rows = [
        {"messages": chat(parts, "a boat", [{**image, "image": picture(50, 150)}], "a cup")},
        {"messages": chat("hello", "yes")},
        {"messages": chat([{**image, "image": picture(5, 5)}], "a cup")},
    ]
    # transformers before 5.2x refuses rows without an image next to others.
    texts = [processor.apply_chat_template(rows[i]["messages"]) for i in (0, 2)]
    images = [[picture(90, 7), picture(50, 150)], [picture(5, 5)]]
    theirs = theirs_of(folder, images=images, text=texts, add_special_tokens=False, padding=True)
    made = collate([rows[0], rows[2]], processor, CollateOptions())
    assert set(theirs) - set(made) == {"cross_attention_mask"}
    assert all(np.array_equal(made[name], array) for name, array in theirs.items() if name in made)
    made = collate(rows, processor, CollateOptions())
    assert made["aspect_ratio_ids"][1].tolist() == [0, 0] and not made["pixel_values"][1].any()
    assert made["aspect_ratio_mask"][1].tolist() == [[1, 0, 0, 0]] * 2
    together = processor.apply_chat_template([row["messages"] for row in rows], tokenize=True)
    assert all(np.array_equal(made[name], together[name]) for name in made if name != "labels")
    assert not np.isin(made["labels"], [processor.image_token_id]).any() and (made["labels"] != -100).any()
    answers = collate(rows[:1], processor, CollateOptions(responses_only=True))["labels"][0]
    assert processor.decode(answers[answers != -100]) == "a boat<|eot_id|>a cup<|eot_id|>"


def test_a_collated_row_becomes_a_batch_of_the_measured_size(processor):
    row = {"messages": chat([{"type": "image", "image": picture(90, 70)}, {"type": "text", "text": "what is it?"}], "a boat")}
    tokens, patches, frames = measure_row(row, processor, CollateOptions())
    assert (patches, frames) == (4 * 16, 4)
    values = ModelValues(pad_token_id=0, vision=vision(processor))
    batch = make_batch([collate([row], processor, CollateOptions())], values, Shape(tokens, patches), rows=1, images=frames)
    assert batch.aspect_ratio_ids.shape == (1, 1, 1) and batch.aspect_ratio_ids.all()
    assert batch.seen_lengths[0, 0, -1] == 17 * TILES[int(batch.aspect_ratio_ids[0, 0, 0])]


def test_a_saved_processor_is_read_by_transformers_and_by_us(folder, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    theirs = TheirProcessor.from_pretrained(tmp_path)
    again = load_processor(tmp_path, "mllama")
    for other in (theirs(images=picture(90, 60), text=ONE, return_tensors="np"), again(images=picture(90, 60), text=ONE)):
        assert all(np.array_equal(array, other[name]) for name, array in processor(images=picture(90, 60), text=ONE).items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.image_inputs(["/no/such.png"]), "image 0"),
        (lambda p: p.video_inputs([[1]]), "not videos"),
        (lambda p: p.grid_of((4, 4), 3), "a video of 3 frames"),
        (lambda p: p.expand([np.array([p.image_token_id])], {}), "row 0: more image placeholders in the text than images"),
        (lambda p: p.expand([np.array([1])], p.image_inputs([picture(4, 4)])), "row 0: 1 images more than placeholders"),
        (lambda p: p(text=ONE, images=[picture(4, 4)] * 2), "row 0: 1 images more than placeholders"),
        (lambda p: p(text=[ONE, "a"], images=[[picture(4, 4)]]), "1 lists of images for 2 texts"),
        (lambda p: p(text=["a", f"b{ONE}"], images=[[picture(4, 4)], []], padding=True), "row 0: 1 images more than placeholders"),
        (lambda p: p(text=["a", "a b c"]), "make no array"),
    ],
)
def test_what_cannot_be_is_refused(processor, call, message):
    with pytest.raises(ValueError, match=message):
        call(processor)


def test_unknown_options_and_limits_of_pixels_are_refused(folder, processor):
    with pytest.raises(TypeError, match="unknown option 'paddin'.*padding"):
        processor(text="a", paddin=True)
    with pytest.raises(ValueError, match="min_pixels and max_pixels mean nothing"):
        load_processor(folder, "mllama", max_pixels=9)
