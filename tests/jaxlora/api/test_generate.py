"""Decoding with a cache is the arg-max of the logits, whatever the padding; sampling is a function of its seed."""

import dataclasses

import numpy as np
import pytest

from jaxlora import FastLanguageModel, FastVisionModel
from tests.jaxlora.api.conftest import picture, write_folder
from tests.tolerances import LOGITS_FP32

NEW = 6
PAD = 2


@pytest.fixture(scope="module")
def text(llama_folder):
    """A model whose adapters are random, so that its tokens differ and depend on them."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(llama_folder), load_in_4bit=False)
    return FastLanguageModel.get_peft_model(model, r=4, lora_alpha=32, init_lora_weights=False), tokenizer


@pytest.fixture(scope="module", params=["qwen2_vl_folder", "gemma3_folder", "mistral3_folder", "mllama_folder"])
def vision(request):
    model, processor = FastVisionModel.from_pretrained(str(request.getfixturevalue(request.param)), load_in_4bit=False)
    return FastVisionModel.get_peft_model(model, r=4, lora_alpha=32, init_lora_weights=False), processor


ROWS = [np.array([7, 130, 42, 99, 255]), np.array([11, 12, 300]), np.array([350, 20, 21, 22, 23, 24, 25, 26, 9])]


def padded(rows, side):
    width = max(map(len, rows))
    gaps = [(width - len(row), 0) if side == "left" else (0, width - len(row)) for row in rows]
    ids = np.stack([np.pad(row, gap, constant_values=PAD) for row, gap in zip(rows, gaps, strict=True)])
    mask = np.stack([np.pad(np.ones(len(row), int), gap) for row, gap in zip(rows, gaps, strict=True)])
    return {"input_ids": ids, "attention_mask": mask}


def step_by_step(model, ids, new=NEW, **media):
    """Greedy tokens of one row, each from a whole forward pass."""
    ids = list(ids)
    for _ in range(new):
        ids.append(int(model(input_ids=np.array([ids]), **media).logits[0, -1].argmax()))
    return ids[-new:]


@pytest.fixture(scope="module")
def greedy(text):
    return [step_by_step(text[0], row) for row in ROWS]


@pytest.mark.parametrize("side", ["left", "right"])
class TestRaggedPrompts:
    def test_new_tokens_are_the_arg_max_of_the_logits(self, text, greedy, side):
        inputs = padded(ROWS, side)
        out = text[0].generate(**inputs, max_new_tokens=NEW, eos_token_id=[])
        np.testing.assert_array_equal(out[:, inputs["input_ids"].shape[1] :], greedy)
        np.testing.assert_array_equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])

    def test_logits_stand_where_their_tokens_do(self, text, side):
        inputs = padded(ROWS, side)
        logits = text[0](**inputs).logits
        for b, row in enumerate(ROWS):
            alone = text[0](input_ids=row[None]).logits[0]
            np.testing.assert_allclose(logits[b][inputs["attention_mask"][b] == 1], alone, atol=LOGITS_FP32)


def test_the_tokens_depend_on_the_prompt(greedy):
    assert len({tuple(row) for row in greedy}) == len(ROWS)
    assert max(len(set(row)) for row in greedy) > 1


def test_a_sliding_window_is_the_same_with_a_cache(tmp_path):
    folder = write_folder(tmp_path, "mistral", sliding_window=4)
    model, _ = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=32, init_lora_weights=False)
    out = model.generate(**padded(ROWS, "right"), max_new_tokens=NEW, eos_token_id=[])[:, 9:]
    assert out.tolist() == [step_by_step(model, row) for row in ROWS]


class TestEnd:
    def test_a_row_stops_after_its_end_token_and_is_padded(self, text, greedy):
        eos = greedy[0][2]
        out = text[0].generate(**padded(ROWS, "right"), max_new_tokens=NEW, eos_token_id=eos)[:, 9:]
        for row, expected in zip(out, greedy, strict=True):
            ends = expected.index(eos) + 1 if eos in expected else NEW
            assert row[:ends].tolist() == expected[: min(ends, len(row))]
            assert set(row[ends:].tolist()) <= {PAD}

    def test_the_output_ends_when_every_row_has_ended(self, text, greedy):
        out = text[0].generate(input_ids=ROWS[0][None], max_new_tokens=NEW, eos_token_id=greedy[0][1])
        assert out[0, len(ROWS[0]) :].tolist() == greedy[0][: greedy[0].index(greedy[0][1]) + 1]

    def test_generation_config_names_the_end(self, text, tmp_path, monkeypatch):
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
        model = text[0]
        monkeypatch.setattr(model, "loaded", dataclasses.replace(model.loaded, folder=tmp_path))
        assert model._eos(None) == (3, 5)
        assert model._eos(7) == (7,)


class TestSampling:
    def draw(self, model, **options):
        return model.generate(input_ids=ROWS[0][None], max_new_tokens=NEW, do_sample=True, eos_token_id=[], **options).tolist()

    def test_one_seed_gives_one_text_and_another_another(self, text):
        options = {"temperature": 5.0, "top_k": 0}
        assert self.draw(text[0], seed=1, **options) == self.draw(text[0], seed=1, **options)
        assert self.draw(text[0], seed=1, **options) != self.draw(text[0], seed=2, **options)

    def test_the_likeliest_token_alone_is_greedy(self, text, greedy):
        assert self.draw(text[0], top_k=1)[0][len(ROWS[0]) :] == greedy[0]


def image_prompt(processor, question, image=None):
    content = [{"type": "text", "text": question}, *([] if image is None else [{"type": "image", "image": image}])]
    rendered = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return rendered, image


def images_and_ids(processor, prompts, side):
    texts, images = zip(*prompts, strict=True)
    processor.tokenizer.padding_side = side
    return processor(
        [image for image in images if image is not None] or None, list(texts), add_special_tokens=False, padding=True
    )  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_with_and_without_images_are_the_arg_max_of_their_own_logits(vision, side):
    model, processor = vision
    prompts = [
        image_prompt(processor, "What is the total?", picture(1, 84, 56)),
        image_prompt(processor, "Hello."),
        image_prompt(processor, "Describe the picture in one sentence.", picture(2, 56, 84)),
    ]
    together = images_and_ids(processor, prompts, side)
    out = model.generate(**together, max_new_tokens=3, eos_token_id=[])[:, together["input_ids"].shape[1] :]
    for b, one in enumerate(prompts):
        alone = images_and_ids(processor, [one], side)
        media = {k: alone[k] for k in ("pixel_values", "image_grid_thw", "image_sizes", "aspect_ratio_ids") if k in alone}
        assert out[b].tolist() == step_by_step(model, alone["input_ids"][0], 3, **media)


def test_an_image_changes_the_logits(vision):
    model, processor = vision
    one, other = (images_and_ids(processor, [image_prompt(processor, "What?", picture(seed, 56, 56))], "right") for seed in (1, 2))
    assert np.abs(model(**one).logits - model(**other).logits).max() > 1e-3


def test_the_loss_of_a_call_is_the_mean_over_shifted_labels(text):
    inputs = padded(ROWS, "left")
    labels = np.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    out = text[0](**inputs, labels=labels)
    logits, targets = out.logits[:, :-1].astype(np.float64), labels[:, 1:]
    kept = (targets != -100) & (inputs["attention_mask"][:, :-1] == 1)
    picked = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    assert out.loss == pytest.approx(((np.log(np.exp(logits).sum(-1)) - picked) * kept).sum() / kept.sum(), abs=1e-5)
