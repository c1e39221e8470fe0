"""Gemma 3's processor against transformers' own, which runs here because it needs no torch."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor as TheirProcessor

from jaxlora.data.batches import make_batch
from jaxlora.data.collate import CollateOptions, collate, measure_row
from jaxlora.data.inputs import ModelValues
from jaxlora.data.ladder import Shape
from jaxlora.data.patches import patches_of
from jaxlora.data.positions import VisionValues
from jaxlora.data.processors import load_processor
from jaxlora.recipes.tiny_tokenizer import TEXT, make_tokenizer
from tests.jaxlora.data.processor_reference import picture

ONE = "<start_of_image>"
SIZES = [(90, 60), (29, 110), (300, 40), (1, 150), (150, 1), (896, 896), (897, 895), (3, 3), (64, 1000), (455, 231), (17, 17), (640, 480)]
# Merges of line breaks, as the real vocabulary has them: those round an image join those of the text.
BREAKS = ["a\n\nb\n\n\nc\n\n\n\nd\n\n\n\n\ne\n" * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = make_tokenizer(tmp_path_factory.mktemp("gemma3"), "gemma3", [*TEXT, *BREAKS])
    config = json.loads((made / "preprocessor_config.json").read_text())
    (made / "preprocessor_config.json").write_text(json.dumps({**config, "size": {"height": 56, "width": 56}}))
    (made / "processor_config.json").write_text(json.dumps({"image_seq_length": 4, "processor_class": "Gemma3Processor"}))
    return made


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(folder, "gemma3")


def theirs_of(folder, length=4):
    return TheirProcessor(Gemma3ImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), None, length)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixel_values_and_ids_are_those_of_transformers(folder, processor, size):
    theirs = theirs_of(folder)(images=picture(*size), text=ONE, return_tensors="np")
    ours = processor(images=picture(*size), text=ONE)
    assert sorted(ours) == sorted(theirs) and ours["pixel_values"].dtype == theirs["pixel_values"].dtype
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_the_released_size_gives_the_pixels_of_transformers(tmp_path):
    folder = make_tokenizer(tmp_path, "gemma3")
    theirs = theirs_of(folder, 256)(images=picture(455, 231), text=ONE, return_tensors="np")
    ours = load_processor(folder, "gemma3")(images=picture(455, 231), text=ONE)
    assert ours["pixel_values"].shape == (1, 3, 896, 896)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "text",
    [
        ONE,
        f"What is it?{ONE}",
        f"user\n{ONE}\nWhat is it?",
        f"user\n\n{ONE}\n\n\nWhat\n is it?",
        f"{ONE}{ONE} and {ONE}",
        f"<start_of_turn>user\n{ONE}Describe the picture.<end_of_turn>\n<start_of_turn>model\n",
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_token_ids_and_types_are_those_of_transformers(folder, processor, text, special):
    images = [picture(30 + i, 20) for i in range(text.count(ONE))]
    theirs = theirs_of(folder)(images=images, text=text, add_special_tokens=special, return_tensors="np")
    ours = processor(images=images, text=text, add_special_tokens=special)
    assert sorted(ours) == sorted(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_batch_of_rows_with_and_without_images_is_that_of_transformers(folder, processor):
    texts, images = [f"{ONE} a\n{ONE}", "a boat", f"b {ONE}"], [[picture(9, 7), picture(8, 30)], [], [picture(40, 40)]]
    theirs = theirs_of(folder)(images=images, text=texts, padding=True, return_tensors="np")
    ours = processor(images=images, text=texts, padding=True)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def chat(*contents):
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant", "user", "assistant"), contents, strict=False)]


def test_a_conversation_becomes_the_inputs_of_transformers(folder, processor):
    user = [{"type": "image", "image": picture(9, 7)}, {"type": "text", "text": " what is it? "}]
    made = processor.apply_chat_template(chat(user), tokenize=True, add_generation_prompt=True)
    text = f"<bos><start_of_turn>user\n{ONE}what is it?<end_of_turn>\n<start_of_turn>model\n"
    theirs = theirs_of(folder)(images=picture(9, 7), text=text, add_special_tokens=False, return_tensors="np")
    assert all(np.array_equal(made[name], theirs[name]) for name in theirs)


def test_a_collated_conversation_has_these_ids_and_labels_on_its_answers(folder, processor):
    parts = [{"type": "text", "text": "look"}, {"type": "image", "image": picture(9, 7)}, {"type": "text", "text": "what is it?"}]
    row = {"messages": chat(parts, "a boat", [{"type": "image", "image": picture(5, 5)}], "a cup")}
    text = processor.apply_chat_template(row["messages"])
    theirs = theirs_of(folder)(images=[picture(9, 7), picture(5, 5)], text=text, add_special_tokens=False, return_tensors="np")
    made = collate([row], processor, CollateOptions(responses_only=True))
    assert all(np.array_equal(made[name], theirs[name]) for name in theirs)
    labelled = made["labels"][0][made["labels"][0] != -100]
    assert processor.decode(labelled) == "a boat<end_of_turn>a cup<end_of_turn>"
    everything = collate([row], processor, CollateOptions())["labels"][0]
    assert not np.isin(everything, [processor.image_token_id]).any() and (everything != -100).sum() > len(labelled)
    assert measure_row(row, processor, CollateOptions())[:2] == (made["input_ids"].shape[1], 2 * 4 * 4)


def test_a_collated_row_becomes_a_batch_of_the_measured_size(processor):
    row = {"messages": chat([{"type": "image", "image": picture(9, 7)}, {"type": "text", "text": "what is it?"}], "a boat")}
    vision = VisionValues(image_token_id=processor.image_token_id, patch_size=14, merge_size=2, patch_elements=588, grid=(1, 4, 4))
    tokens, patches, images = measure_row(row, processor, CollateOptions())
    made = collate([row], processor, CollateOptions())
    batch = make_batch([made], ModelValues(pad_token_id=0, vision=vision), Shape(tokens, patches), rows=1, images=images)
    assert np.array_equal(batch.patches[0, 0], patches_of(made["pixel_values"][0], 14, 2))
    assert batch.vision_index[0, 0][made["token_type_ids"][0] == 1].tolist() == [0, 1, 2, 3]


def test_a_control_token_that_a_user_types_is_no_image(processor):
    made = collate([{"messages": chat(f"what is {ONE}?", "a token")}], processor, CollateOptions())
    assert "pixel_values" not in made and not made["token_type_ids"].any()


def test_plain_text_with_an_image_is_prepared(folder, processor):
    made = collate([{"text": f"see {ONE} a boat", "images": [picture(9, 7)]}], processor, CollateOptions())
    assert made["token_type_ids"].sum() == 4


def test_measuring_equals_making(processor):
    made = processor(images=[picture(9, 7)], text=f"a\n{ONE}\nb", add_special_tokens=False)
    assert processor.measure(f"a\n{ONE}\nb", [(9, 7)]) == (made["input_ids"].shape[1], 16)


def test_saving_and_loading_changes_nothing_and_transformers_reads_it(processor, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    again, theirs = load_processor(tmp_path / "saved", "gemma3"), TheirProcessor.from_pretrained(tmp_path / "saved")
    first = processor(images=picture(9, 7), text=f"a {ONE}")
    assert again.chat_template == processor.chat_template
    for other in (again(images=picture(9, 7), text=f"a {ONE}"), theirs(images=picture(9, 7), text=f"a {ONE}", return_tensors="np")):
        assert all(np.array_equal(first[name], other[name]) for name in first)


def test_newer_configurations_are_read(folder, tmp_path):
    config = json.loads((folder / "preprocessor_config.json").read_text())
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config, "image_seq_length": 4}))
    made = load_processor(tmp_path, "gemma3")(images=picture(9, 7), text=ONE)
    assert made["pixel_values"].shape == (1, 3, 56, 56) and made["token_type_ids"].sum() == 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"text": ["x", ONE]}, ValueError, "row 1: more image placeholders"),
        ({"text": [ONE, "x"], "images": [picture(9, 6)] * 2, "padding": True}, ValueError, "row 1: 1 images more than placeholders"),
        ({"text": "x", "trunctation": True}, TypeError, "did you mean 'truncation'"),
        ({"text": ONE, "images": [picture(9, 6)], "truncation": True, "max_length": 4}, ValueError, "row 0: cutting its"),
        ({"text": "x", "videos": [[picture(9, 6)]]}, ValueError, "sees images, not videos"),
        ({"text": ["7", "77 7"]}, ValueError, "padding=True"),
    ],
)
def test_a_wrong_call_is_refused(processor, call, error, message):
    with pytest.raises(error, match=message):
        processor(**call)


def test_pan_and_scan_and_pixel_limits_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="min_pixels and max_pixels mean nothing"):
        load_processor(folder, "gemma3", max_pixels=3136)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**config, "do_pan_and_scan": True}))
    with pytest.raises(NotImplementedError, match="asks for do_pan_and_scan"):
        load_processor(tmp_path, "gemma3")


def test_grey_and_transparent_images_are_read(processor):
    for mode in ("L", "RGBA", "P"):
        assert processor(images=Image.new(mode, (9, 7)), text=ONE)["pixel_values"].shape == (1, 3, 56, 56)
