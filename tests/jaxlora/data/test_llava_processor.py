"""The processors of LLaVA, Pixtral and Mistral 3 against transformers' own code, which runs here without torch on its PIL classes."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor as TheirLlava
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from jaxlora.data.batches import make_batch
from jaxlora.data.collate import CollateOptions, collate, measure_row
from jaxlora.data.inputs import ModelValues
from jaxlora.data.ladder import Shape
from jaxlora.data.llava import PixtralProcessor
from jaxlora.data.patches import patches_of
from jaxlora.data.positions import VisionValues
from jaxlora.data.processors import load_processor
from jaxlora.recipes.tiny_tokenizer import make_tokenizer
from tests.jaxlora.data.processor_reference import picture
from tests.jaxlora.models.llava import GRIDS, MERGE, OF_ANY_SIZE
from tests.jaxlora.models.llava_configs import CONFIGS as MODEL_CONFIGS

SIZES = [(90, 60), (29, 110), (300, 40), (1, 90), (90, 1), (48, 48), (49, 47), (3, 3), (64, 1000), (455, 231), (17, 17), (640, 480)]
FAMILIES = ("llava", "pixtral", "siglip", "mistral3")
PLACEHOLDER = {"llava": "<image>", "siglip": "<image>", "pixtral": "[IMG]", "mistral3": "[IMG]"}
MODEL_TYPE = {family: "mistral3" if family == "mistral3" else "llava" for family in FAMILIES}
# Small sizes, so that images are made smaller and larger.
CONFIGS = {
    "llava": (
        {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}},
        {"patch_size": 14, "num_additional_image_tokens": 1},
    ),
    "siglip": (
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}, "do_center_crop": None, "crop_size": None},
        {"patch_size": 14, "num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"},
    ),
    "pixtral": ({"size": {"longest_edge": 96}}, {"patch_size": 16}),
    "mistral3": ({"size": {"longest_edge": 112}}, {"patch_size": 14, "spatial_merge_size": 2}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family, (image, whole) in CONFIGS.items():
        made[family] = make_tokenizer(tmp_path_factory.mktemp(family), "llava" if PLACEHOLDER[family] == "<image>" else "pixtral")
        config = json.loads((made[family] / "preprocessor_config.json").read_text())
        (made[family] / "preprocessor_config.json").write_text(json.dumps({**config, **image}))
        (made[family] / "processor_config.json").write_text(json.dumps(whole))
    return made


@pytest.fixture(scope="module")
def processors(folders):
    return {family: load_processor(folder, MODEL_TYPE[family]) for family, folder in folders.items()}


@pytest.fixture
def theirs_of(folders, monkeypatch):
    """transformers' own processors. Pixtral's imports a function from a module that needs torchvision; the PIL module has the same."""
    stand_in = types.ModuleType("image_processing_pixtral")
    stand_in.get_resize_output_image_size = image_processing_pil_pixtral.get_resize_output_image_size
    monkeypatch.setitem(sys.modules, "transformers.models.pixtral.image_processing_pixtral", stand_in)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor as TheirPixtral

    monkeypatch.setattr(TheirPixtral, "check_argument_for_proper_class", lambda *_: None)

    def make(family):
        folder = folders[family]
        tokenizer, whole = AutoTokenizer.from_pretrained(folder), CONFIGS[family][1]
        if PLACEHOLDER[family] == "[IMG]":
            return TheirPixtral(PixtralImageProcessorPil.from_pretrained(folder), tokenizer, **whole)
        image = {"llava": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}[family].from_pretrained(folder)
        return TheirLlava(image, tokenizer, **{"vision_feature_select_strategy": "default", **whole})

    return make


def assert_same(ours, theirs):
    assert sorted(ours) == sorted(name for name in theirs if name != "token_type_ids")
    for name, array in ours.items():
        assert np.array_equal(array, theirs[name]), name


@every_family
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_and_ids_are_those_of_transformers(processors, theirs_of, family, size):
    text = f"a {PLACEHOLDER[family]}\nb"
    theirs = theirs_of(family)(images=picture(*size), text=text, return_tensors="np")
    ours = processors[family](images=picture(*size), text=text)
    assert ours["pixel_values"].dtype == theirs["pixel_values"].dtype
    assert_same(ours, theirs)


@every_family
def test_a_batch_of_rows_with_and_without_images_is_that_of_transformers(processors, theirs_of, family):
    one = PLACEHOLDER[family]
    texts, images = [f"{one}{one} a\n", "a boat", f"b {one}"], [[picture(9, 7), picture(80, 130)], [], [picture(40, 50)]]
    flat = [image for row in images for image in row]
    theirs = theirs_of(family)(images=flat, text=texts, padding=True, return_tensors="np")
    assert_same(processors[family](images=images, text=texts, padding=True), theirs)


def test_mistral3_merges_by_two_where_no_file_says_so(folders, tmp_path):
    for path in folders["mistral3"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "processor_config.json").write_text(json.dumps({"patch_size": 14}))
    assert load_processor(tmp_path, "mistral3").spatial_merge_size == 2


@pytest.mark.parametrize(("family", "side"), [("llava", (336, 336)), ("pixtral", (528, 1024))])
def test_the_released_sizes_give_the_pixels_of_transformers(tmp_path, family, side):
    folder = make_tokenizer(tmp_path, family)
    ours = load_processor(folder, "llava")(images=picture(1455, 731), text=PLACEHOLDER[family])
    image = {"llava": CLIPImageProcessorPil, "pixtral": PixtralImageProcessorPil}[family].from_pretrained(folder)
    assert ours["pixel_values"].shape == (1, 3, *side)
    assert np.array_equal(ours["pixel_values"], image(picture(1455, 731), return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_the_widest_image_of_a_models_reference_is_as_wide_as_one_may_be(processors, name):
    vision, merge = MODEL_CONFIGS[name]["vision_config"], MERGE[name]
    image_processor = PixtralImageProcessorPil(size={"longest_edge": vision["image_size"]})
    made = PixtralProcessor(image_processor, processors["pixtral"].tokenizer, vision["patch_size"], merge)
    grid = made.grid_of((1000, 90))
    assert grid[2] * vision["patch_size"] == vision["image_size"]
    assert (grid[1] // merge, grid[2] // merge) in GRIDS


def chat(*contents):
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant", "user", "assistant"), contents, strict=False)]


@every_family
def test_a_collated_conversation_has_the_ids_of_transformers_and_labels_on_its_answers(processors, theirs_of, family):
    processor, images = processors[family], [picture(9, 7), picture(50, 85)]
    parts = [{"type": "text", "text": "look"}, {"type": "image", "image": images[0]}, {"type": "text", "text": "what is it?"}]
    rows = [{"messages": chat(parts, "a boat", [{"type": "image", "image": image}], "a cup")} for image in (images[1], picture(5, 5))]
    texts = [processor.apply_chat_template(row["messages"]) for row in rows]
    given = [images[0], images[1], images[0], picture(5, 5)]
    theirs = theirs_of(family)(images=given, text=texts, add_special_tokens=False, padding=True, return_tensors="np")
    made = collate(rows, processor, CollateOptions())
    assert_same({name: array for name, array in made.items() if name != "labels"}, theirs)
    everything = made["labels"][0]
    assert not np.isin(everything, processor.media_token_ids).any() and (everything != -100).any()
    only = collate(rows[:1], processor, CollateOptions(responses_only=True))["labels"][0]
    assert processor.decode(only[only != -100]).replace("</s>", " ").split() == ["a", "boat", "a", "cup"]
    patches = sum(h * w for _, h, w in map(processor.grid_of, [(9, 7), (50, 85)]))
    assert measure_row(rows[0], processor, CollateOptions())[:2] == (int(made["attention_mask"][0].sum()), patches)


# 3 x 2 features of 16 pixels, or 2 x 1 of 28.
@pytest.mark.parametrize(("family", "features"), [("pixtral", 6), ("mistral3", 2)])
def test_a_collated_row_of_any_size_becomes_a_batch_of_the_measured_size(processors, family, features):
    processor = processors[family]
    size, merge = processor.patch_size, processor.spatial_merge_size
    row = {"messages": chat([{"type": "image", "image": picture(39, 17)}, {"type": "text", "text": "?"}], "a boat")}
    vision = {"image_token_id": processor.image_token_id, "patch_size": size, "merge_size": merge, "patch_elements": 3 * size**2}
    values = ModelValues(pad_token_id=0, vision=VisionValues(**vision, row_breaks=True))
    tokens, patches, images = measure_row(row, processor, CollateOptions())
    made = collate([row], processor, CollateOptions())
    batch = make_batch([made], values, Shape(tokens, patches), rows=1, images=images)
    assert np.array_equal(batch.patches[0, 0], patches_of(made["pixel_values"][0], size, merge))
    assert batch.vision_index[0, 0][made["input_ids"][0] == processor.image_token_id].tolist() == list(range(features))
    assert (batch.vision_index[0, 0] >= 0).sum() == features


@every_family
def test_saving_and_loading_changes_nothing(processors, tmp_path, family):
    processor, text = processors[family], f"a {PLACEHOLDER[family]}"
    processor.save_pretrained(tmp_path / "saved")
    again = load_processor(tmp_path / "saved", MODEL_TYPE[family])
    first, second = (made(images=picture(9, 70), text=text) for made in (processor, again))
    assert again.chat_template == processor.chat_template
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_transformers_reads_what_llava_saved(processors, tmp_path):
    processors["llava"].save_pretrained(tmp_path / "saved")
    theirs = TheirLlava.from_pretrained(tmp_path / "saved")(images=picture(9, 70), text="a <image>", return_tensors="np")
    assert_same(processors["llava"](images=picture(9, 70), text="a <image>"), theirs)


@every_family
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"text": ["x", "{}"]}, ValueError, "row 1: more image placeholders"),
        ({"text": ["{}", "x"], "images": [picture(9, 6)] * 2, "padding": True}, ValueError, "row 1: 1 images more than placeholders"),
        ({"text": "x", "trunctation": True}, TypeError, "did you mean 'truncation'"),
        ({"text": "{}", "images": [picture(90, 6)], "truncation": True, "max_length": 2}, ValueError, "row 0: cutting its"),
        ({"text": "x", "videos": [[picture(9, 6)]]}, ValueError, "sees images, not videos"),
    ],
)
def test_a_wrong_call_is_refused(processors, family, call, error, message):
    text = call["text"]
    filled = [one.format(PLACEHOLDER[family]) for one in text] if isinstance(text, list) else text.format(PLACEHOLDER[family])
    with pytest.raises(error, match=message):
        processors[family](**{**call, "text": filled})


def test_an_unknown_image_processor_and_pixel_limits_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="min_pixels and max_pixels mean nothing"):
        load_processor(folders["llava"], "llava", max_pixels=3136)
    for path in folders["llava"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    with pytest.raises(NotImplementedError, match="asks for image_processor_type 'ViTImageProcessor'"):
        load_processor(tmp_path, "llava")


def test_an_image_of_which_nothing_would_be_left_is_refused(processors):
    for call in (lambda: processors["pixtral"](images=picture(150, 1), text="[IMG]"), lambda: processors["pixtral"].grid_of((150, 1))):
        with pytest.raises(ValueError, match="an image of 150 x 1 pixels, made to fit 96 x 96, has no pixel on one side"):
            call()


def test_grey_and_transparent_images_are_read(processors):
    for mode in ("L", "RGBA", "P"):
        assert processors["pixtral"](images=Image.new(mode, (9, 7)), text="[IMG]")["pixel_values"].shape == (1, 3, 16, 16)
