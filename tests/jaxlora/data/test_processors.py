import json
import types

import numpy as np
import pytest
from PIL import Image

from jaxlora.data.positions import patch_positions
from jaxlora.data.processors import load_processor
from jaxlora.data.qwen_vl import QwenVLProcessor
from jaxlora.recipes.tiny_tokenizer import PREPROCESSOR, make_tokenizer
from tests.jaxlora import reference
from tests.jaxlora.data import processor_reference
from tests.jaxlora.data.processor_reference import picture
from tests.tolerances import REORDERED_FP32, RESIZED_PIXELS

ONE = "<|vision_start|><|image_pad|><|vision_end|>"
SIZES, TEXTS = processor_reference.SIZES, processor_reference.TEXTS
every_model = pytest.mark.parametrize("model_type", processor_reference.PROCESSORS)


@pytest.fixture
def folder(tmp_path):
    return make_tokenizer(tmp_path / "model", "qwen2_vl")


@pytest.fixture
def processor(folder):
    return load_processor(folder, "qwen2_vl")


@pytest.fixture
def made(processor):
    return processor(images=processor_reference.images(), text=TEXTS, padding=True)


def small_limits(tmp_path, model_type):
    return load_processor(processor_reference.write_folder(tmp_path / "model", model_type), model_type)


@every_model
def test_ids_grids_and_pixels_of_images_are_those_of_transformers(model_type, tmp_path):
    ours = small_limits(tmp_path, model_type)(images=processor_reference.images(), text=TEXTS, padding=True)
    theirs = processor_reference.expected(model_type, "image")
    assert set(ours) == set(theirs)
    for name in set(theirs) - {"pixel_values"}:
        assert np.array_equal(ours[name], theirs[name]), name
    assert np.array_equal(ours["pixel_values"][:, ::13], theirs["pixel_values"])


@every_model
def test_ids_grids_times_and_pixels_of_videos_are_those_of_transformers(model_type, tmp_path):
    films = [processor_reference.film(model_type, i) for i in range(len(processor_reference.VIDEOS))]
    fps = [rate for _, rate in processor_reference.VIDEOS]
    ours = small_limits(tmp_path, model_type)(videos=films, text=processor_reference.VIDEO_TEXTS, padding=True, fps=fps)
    theirs = processor_reference.expected(model_type, "video")
    assert set(ours) == set(theirs)
    for name in set(theirs) - {"pixel_values_videos"}:
        assert np.array_equal(ours[name], theirs[name]), name
    difference = np.abs(ours["pixel_values_videos"][:, ::13] - theirs["pixel_values_videos"])
    untouched = int(ours["video_grid_thw"][0].prod())
    assert difference[:untouched].max() <= REORDERED_FP32 and difference[untouched:].max() <= RESIZED_PIXELS


@pytest.mark.parametrize("around", ["", "<|vision_start|>{}<|vision_end|>"])
def test_times_replace_the_placeholder_and_the_vision_tokens_around_it(around, tmp_path):
    processor = small_limits(tmp_path, "qwen3_vl")
    text = (around or "{}").format("<|video_pad|>")
    pair = "<|vision_start|><|video_pad|><|vision_end|>"
    written_out = processor.prepare(f"see {text}!", [(3, 2.0)])
    assert written_out == f"see <0.2 seconds>{pair}<1.0 seconds>{pair}!"


def test_a_patch_holds_its_pixels_channel_frame_row_column(processor):
    # 84 x 56 divides by 28: nothing is resized, so that the formula holds to float32 rounding.
    image = picture(84, 56)
    pixels = (np.asarray(image) / 255 - PREPROCESSOR["image_mean"]) / PREPROCESSOR["image_std"]
    patches = processor.image_inputs([image])["pixel_values"].reshape(-1, 3, 2, 14, 14)
    for patch, (row, column) in zip(patches, patch_positions((1, 4, 6), 2), strict=True):
        expected = pixels[14 * row : 14 * row + 14, 14 * column : 14 * column + 14].transpose(2, 0, 1)
        assert np.allclose(patch, expected[:, None], atol=1e-5)


def test_a_video_puts_successive_frames_in_one_patch(processor):
    # The least size of a frame, 128 merged cells, and a multiple of 28: nothing is resized.
    frames = [Image.new("RGB", (448, 224), (shade, shade, shade)) for shade in (0, 100, 200)]
    made = processor(videos=[frames], text="<|video_pad|>")
    grid = made["video_grid_thw"][0].tolist()
    assert grid == [2, 16, 32]
    assert made["input_ids"].shape == (1, 2 * 16 * 32 // 4) and (made["mm_token_type_ids"] == 2).all()
    patches = made["pixel_values_videos"].reshape(2, 16 * 32, 3, 2, 14, 14)
    red = patches[:, :, 0].mean((1, 3, 4)) * PREPROCESSOR["image_std"][0] + PREPROCESSOR["image_mean"][0]
    assert np.allclose(red * 255, [[0, 100], [200, 200]], atol=1e-3)


@pytest.mark.parametrize("size", [(90, 60), (29, 110), (3000, 2000), (20, 20), (1, 150)])
def test_measuring_equals_making(processor, size):
    made = processor(images=[Image.new("RGB", size)], text=f"{ONE} two boats")
    assert processor.measure(f"{ONE} two boats", [size]) == (made["input_ids"].shape[1], len(made["pixel_values"]))


@every_model
def test_the_images_of_a_models_reference_are_at_the_limits(model_type, tmp_path):
    processor = small_limits(tmp_path, model_type)
    processor.image_processor.patch_size, processor.image_processor.size = 4, {"shortest_edge": 350, "longest_edge": 832}
    smallest, _, longest = reference.expected(model_type)["image_grid_thw"].tolist()
    assert processor.grid_of((11, 7)) == tuple(smallest) and processor.grid_of((1000, 90)) == tuple(longest)


def test_measuring_a_video_equals_making_it(processor):
    made = processor(videos=[[Image.new("RGB", (90, 60))] * 3], text="<|video_pad|>")
    assert processor.measure("<|video_pad|>", (), [(90, 60, 3)]) == (made["input_ids"].shape[1], len(made["pixel_values_videos"]))


def test_pixel_limits_are_obeyed_and_stay_with_their_processor(folder):
    small = load_processor(folder, "qwen2_vl", min_pixels=784, max_pixels=28 * 28 * 4)
    assert small.image_inputs([Image.new("RGB", (500, 500))])["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert load_processor(folder, "qwen2_vl").grid_of((500, 500)) == (1, 36, 36)


@pytest.mark.parametrize(
    "written",
    [
        {
            "preprocessor_config.json": {
                "image_processor_type": "Qwen2VLImageProcessorFast",
                "min_pixels": 784,
                "max_pixels": 3136,
                "patch_size": 14,
            }
        },
        {"preprocessor_config.json": {"size": {"min_pixels": 784, "max_pixels": 3136}}},
        {
            "processor_config.json": {
                "image_processor": {"size": {"shortest_edge": 784, "longest_edge": 3136}},
                "processor_class": "Qwen2VLProcessor",
            }
        },
    ],
)
def test_older_and_newer_configurations_are_read(folder, written):
    (folder / "preprocessor_config.json").unlink()
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content))
    assert load_processor(folder, "qwen2_vl").grid_of((500, 500)) == (1, 4, 4)


def test_a_chat_template_in_the_older_file_is_read(folder):
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_processor(folder, "qwen2_vl").chat_template == template


def test_saving_and_loading_changes_nothing(processor, made, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    again = load_processor(tmp_path / "saved", "qwen2_vl")(images=[picture(*size) for size in SIZES], text=TEXTS, padding=True)
    assert all(np.array_equal(made[name], again[name]) for name in made)
    assert load_processor(tmp_path / "saved", "qwen2_vl").chat_template == processor.chat_template


def test_a_conversation_becomes_inputs_with_its_images(processor):
    turns = [{"role": "user", "content": [{"type": "image", "image": picture(90, 60)}, {"type": "text", "text": "?"}]}]
    made = processor.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=True)
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text.endswith(f"{ONE}?<|im_end|>\n<|im_start|>assistant\n")
    assert np.array_equal(made["input_ids"], processor(images=[picture(90, 60)], text=text, add_special_tokens=False)["input_ids"])


def test_positional_arguments_and_a_move_to_a_device_work_as_in_notebooks(processor):
    made = processor(picture(90, 60), ONE, add_special_tokens=False, return_tensors="pt").to("cuda")
    assert isinstance(made["pixel_values"], np.ndarray)


def test_decoding_is_the_tokenizers(processor):
    assert processor.batch_decode(processor.tokenizer(["a boat"])["input_ids"]) == ["a boat"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"text": ["x", ONE]}, ValueError, "row 1: more image placeholders"),
        ({"text": [ONE, "x"], "images": [picture(90, 60)] * 2, "padding": True}, ValueError, "row 1: 1 images more than placeholders"),
        ({"text": ["7", "77 7"]}, ValueError, "padding=True"),
        ({"text": "x", "trunctation": True}, TypeError, "did you mean 'truncation'"),
        ({"text": ONE, "images": [picture(90, 60)], "truncation": True, "max_length": 4}, ValueError, "row 0: cutting its 8 tokens to 4"),
        ({"text": ONE, "images": [picture(2, 900)]}, ValueError, "image 0 of 2 x 900 pixels"),
        ({"text": "7 7 7", "padding": "max_length", "max_length": 2}, ValueError, "more than max_length 2"),
    ],
)
def test_a_wrong_call_is_refused(processor, call, error, message):
    with pytest.raises(error, match=message):
        processor(**call)


def test_truncation_and_padding_reach_the_length_asked_for(processor):
    made = processor(text=["7777 77 7 7 7 7", "7"], truncation=True, max_length=4, padding="max_length")
    assert made["input_ids"].shape == (2, 4) and made["attention_mask"].sum(1).tolist() == [4, 1]


def test_a_text_model_gets_its_tokenizer(tmp_path):
    tokenizer = load_processor(make_tokenizer(tmp_path, "llama"), "llama")
    assert tokenizer("a boat")["input_ids"] and not isinstance(tokenizer, QwenVLProcessor)


def test_a_folder_without_tokenizer_loads_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="loads without a tokenizer"):
        assert load_processor(tmp_path, "qwen2_vl") is None


def test_a_vision_folder_without_image_processor_gives_its_tokenizer_with_a_warning(folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="its tokenizer alone"):
        assert load_processor(folder, "qwen2_vl")("a boat")["input_ids"]


def test_a_tokenizer_without_a_pad_token_pads_only_what_needs_no_padding(processor):
    processor.tokenizer = types.SimpleNamespace(pad_token_id=None, padding_side="right")
    from jaxlora.data.padding import pad_rows

    assert pad_rows([np.array([1, 2])], processor.tokenizer)["input_ids"].tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="no pad token"):
        pad_rows([np.array([1, 2]), np.array([1])], processor.tokenizer)
