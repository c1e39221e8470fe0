"""Scripts written for Unsloth and TRL, run as they stand but for their import lines, folder names and number of steps."""

import numpy as np
import pytest

from conversion.safetensors_io import open_checkpoint
from jaxlora import FastLanguageModel, FastVisionModel, SFTConfig, SFTTrainer, UnslothVisionDataCollator
from jaxlora.api import folders
from jaxlora.nn.stack import linears
from tests.jaxlora.api.conftest import picture, text_row, vision_row

STEPS = 3


def counts(model):
    return {" ".join(place): n for place, n in model.selection.counts.items()}


@pytest.fixture(scope="module")
def ocr(qwen2_vl_folder, tmp_path_factory):
    """Scripts 1 and 2: an OCR dataset, every tower."""
    output_dir = str(tmp_path_factory.mktemp("runs") / "vision_output")
    dataset = [
        {"question": f"Read line {i}.", "image": picture(i, 56 + 28 * (i % 2), 56), "answer": f"The total is {i}.70."} for i in range(6)
    ]

    model, tokenizer = FastVisionModel.from_pretrained(model_name=str(qwen2_vl_folder), max_seq_length=2048, load_in_4bit=True)
    model = FastVisionModel.get_peft_model(
        model,
        finetune_vision_layers=True,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )

    def format_sample(s):
        return {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "OCR assistant"}]},
                {"role": "user", "content": [{"type": "text", "text": s["question"]}, {"type": "image", "image": s["image"]}]},
                {"role": "assistant", "content": [{"type": "text", "text": s["answer"]}]},
            ]
        }

    train_dataset = [format_sample(s) for s in dataset]
    FastVisionModel.for_training(model)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        data_collator=UnslothVisionDataCollator(model, tokenizer),
        train_dataset=train_dataset,
        args=SFTConfig(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=STEPS,
            learning_rate=2e-4,
            output_dir=output_dir,
            remove_unused_columns=False,
            dataset_text_field="",
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
    )
    return model, tokenizer, trainer, trainer.train(), train_dataset


def prompt(processor, row):
    text = processor.apply_chat_template(row["messages"][:2], add_generation_prompt=True)
    return processor(row["messages"][1]["content"][1]["image"], text, add_special_tokens=False)


class TestOCR:
    def test_learns(self, ocr):
        _, _, trainer, result, _ = ocr
        losses = [entry["loss"] for entry in trainer.state.log_history]
        assert result.global_step == STEPS
        assert losses[-1] < losses[0]
        assert result.training_loss == pytest.approx(np.mean(losses), rel=1e-6)

    def test_adapts_both_towers_and_no_connector(self, ocr):
        assert counts(ocr[0]) == {"vision attention": 4, "vision mlp": 4, "language attention": 8, "language mlp": 6}

    def test_every_adapter_was_trained(self, ocr):
        stacked = [linear.lora.b for linear in adapted(ocr[0])]
        assert all(np.abs(layer).max() > 0 for leaf in stacked for layer in leaf)

    def test_saved_adapter_loads_with_its_base_and_gives_the_same_logits(self, ocr, tmp_path):
        model, tokenizer, _, _, rows = ocr
        model.save_pretrained(tmp_path / "vision_model_lora")
        tokenizer.save_pretrained(tmp_path / "vision_model_lora")
        again, processor = FastVisionModel.from_pretrained(str(tmp_path / "vision_model_lora"))
        inputs = prompt(processor, rows[0])
        np.testing.assert_array_equal(again(**inputs).logits, model(**inputs).logits)
        assert counts(again) == counts(model)

    def test_generates_after_training(self, ocr):
        model, tokenizer, _, _, rows = ocr
        FastVisionModel.for_inference(model)
        inputs = prompt(tokenizer, rows[0])
        out = model.generate(**inputs, max_new_tokens=4, use_cache=True, temperature=1.5, min_p=0.1)
        np.testing.assert_array_equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
        assert 1 <= out.shape[1] - inputs["input_ids"].shape[1] <= 4

    def test_pushes_a_merged_folder_that_has_everything(self, ocr, monkeypatch):
        model, tokenizer, *_ = ocr
        pushed = {}

        class Hub:
            def __init__(self, token):
                pushed["token"] = token

            def create_repo(self, repo_id, exist_ok):
                pushed["repo"] = repo_id

            def upload_folder(self, repo_id, folder_path):
                checkpoint = open_checkpoint(folder_path)
                pushed["tensors"] = {name: checkpoint.read(name) for name in checkpoint.names()}
                pushed["processor"] = folders.load_processor(folder_path, "qwen2_vl")

        monkeypatch.setattr(folders.huggingface_hub, "HfApi", Hub)
        model.push_to_hub_merged("username/qwen2-vl-finetuned", tokenizer, token="hf_secret")
        assert (pushed["repo"], pushed["token"]) == ("username/qwen2-vl-finetuned", "hf_secret")
        base = open_checkpoint(model.loaded.folder)
        changed = {name for name, array in pushed["tensors"].items() if not np.array_equal(array, base.read(name))}
        assert set(pushed["tensors"]) == set(base.names())
        assert len(changed) == len(model.selection.paths)
        assert pushed["processor"].tokenizer.get_vocab() == tokenizer.tokenizer.get_vocab()


def adapted(model):
    return [linear for linear in linears(model.module()).values() if linear.lora is not None]


ALL_ON = dict.fromkeys(("finetune_vision_layers", "finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules"), True)
VISION = {"vision attention": 4, "vision mlp": 4}
LANGUAGE = {"language attention": 8, "language mlp": 6}
SELECTIONS = {
    "language only": ({**ALL_ON, "finetune_vision_layers": False, "r": 16}, LANGUAGE),
    "vision only": ({"finetune_vision_layers": True, "finetune_language_layers": False, "r": 32}, VISION),
    "all-linear": ({**ALL_ON, "target_modules": "all-linear"}, {**VISION, **LANGUAGE, "connector other": 2}),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_towers_that_are_switched_on_are_adapted(name, qwen2_vl_folder):
    arguments, expected = SELECTIONS[name]
    model, tokenizer = FastVisionModel.from_pretrained(model_name=str(qwen2_vl_folder), load_in_4bit=False)
    model = FastVisionModel.get_peft_model(model, **arguments)
    assert counts(model) == expected


@pytest.fixture(scope="module")
def mllama(mllama_folder, tmp_path_factory):
    """Script 3 on the model that it names, and training on images of one and several tiles, with a row without any."""
    model, tokenizer = FastVisionModel.from_pretrained(model_name=str(mllama_folder), load_in_4bit=True)
    model = FastVisionModel.get_peft_model(
        model,
        finetune_vision_layers=False,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        r=16,
    )
    rows = [*(vision_row(i, width=15, height=15 + 16 * (i % 3)) for i in range(5)), text_row(7)]
    FastVisionModel.for_training(model)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        data_collator=UnslothVisionDataCollator(model, tokenizer),
        train_dataset=rows,
        args=SFTConfig(
            per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=STEPS, learning_rate=2e-3,
            output_dir=str(tmp_path_factory.mktemp("mllama_output")), save_strategy="no",
        ),
    )  # fmt: skip
    return model, tokenizer, trainer, trainer.train(), rows


class TestMllama:
    def test_learns_in_the_language_layers_and_nowhere_else(self, mllama):
        model, _, trainer, result, _ = mllama
        losses = [entry["loss"] for entry in trainer.state.log_history]
        assert result.global_step == STEPS and losses[-1] < losses[0]
        assert counts(model) == {"language attention": 12, "language mlp": 9}
        assert all(np.abs(layer).max() > 0 for linear in adapted(model) for layer in linear.lora.b)

    def test_saved_adapter_loads_with_its_base_and_gives_the_same_logits_and_text(self, mllama, tmp_path):
        model, tokenizer, _, _, rows = mllama
        model.save_pretrained(tmp_path / "lora")
        tokenizer.save_pretrained(tmp_path / "lora")
        again, processor = FastVisionModel.from_pretrained(str(tmp_path / "lora"))
        inputs = prompt(processor, rows[1])
        np.testing.assert_array_equal(again(**inputs).logits, model(**inputs).logits)
        FastVisionModel.for_inference(model)
        out = model.generate(**inputs, max_new_tokens=4, use_cache=True)
        assert 1 <= out.shape[1] - inputs["input_ids"].shape[1] <= 4


MLLAMA_SELECTIONS = {
    "vision only": (
        {"finetune_vision_layers": True, "finetune_language_layers": False, "r": 32},
        {"vision attention": 24, "vision mlp": 12},
    ),
    "all-linear": (
        {**ALL_ON, "target_modules": "all-linear"},
        {"vision attention": 24, "vision mlp": 12, "language attention": 12, "language mlp": 9, "connector other": 1},
    ),
}


@pytest.mark.parametrize("name", MLLAMA_SELECTIONS)
def test_the_variants_of_script_3_adapt_the_towers_of_mllama_that_are_switched_on(name, mllama_folder):
    arguments, expected = MLLAMA_SELECTIONS[name]
    model, _ = FastVisionModel.from_pretrained(model_name=str(mllama_folder), load_in_4bit=False)
    assert counts(FastVisionModel.get_peft_model(model, **arguments)) == expected


@pytest.fixture(scope="module")
def language(llama_folder, tmp_path_factory):
    """Script 4, and the training that follows it."""
    model, tokenizer = FastLanguageModel.from_pretrained(model_name=str(llama_folder), max_seq_length=2048, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16,
        lora_dropout=0,
        use_gradient_checkpointing="unsloth",
    )
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=[text_row(i) for i in range(8)],
        eval_dataset=[text_row(i) for i in range(20, 24)],
        args=SFTConfig(
            max_steps=STEPS, learning_rate=1e-3, output_dir=str(tmp_path_factory.mktemp("text")), eval_strategy="steps", eval_steps=2,
            save_strategy="no",
        ),
    )  # fmt: skip
    return model, trainer, trainer.train()


class TestLanguage:
    def test_learns_and_evaluates(self, language):
        _, trainer, result = language
        evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert result.global_step == STEPS
        assert len(evaluations) == 2
        assert trainer.evaluate()["eval_loss"] == evaluations[1] < evaluations[0]

    def test_evaluation_is_the_mean_token_loss_of_the_logits(self, language):
        model, trainer, _ = language
        total = count = 0
        for i in range(len(trainer.eval_source.lengths)):
            inputs = trainer.eval_source.inputs([i])
            labels = inputs["labels"][:, 1:]
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1].astype(np.float64)
            lse = np.log(np.exp(logits).sum(-1))
            picked = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
            total += ((lse - picked) * (labels != -100)).sum()
            count += (labels != -100).sum()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, abs=1e-5)

    def test_prints_what_is_trained(self, language, capsys):
        model = language[0]
        model.print_trainable_parameters()
        layers, width, mlp, q, kv, r = 2, 72, 100, 6 * 20, 2 * 20, 16
        projections = [(width, q), (width, kv), (width, kv), (q, width), (width, mlp), (width, mlp), (mlp, width)]
        lora = layers * sum(r * (i + o) for i, o in projections)
        biases = q + 2 * kv + width + 2 * mlp + width
        base = 400 * width + width + layers * (sum(i * o for i, o in projections) + biases + 2 * width)
        assert (
            f"trainable params: {lora:,} || all params: {base + lora:,} || trainable%: {100 * lora / (base + lora):.4f}"
            in capsys.readouterr().out
        )

    def test_high_rank_with_rslora(self, llama_folder):
        model, _ = FastLanguageModel.from_pretrained(str(llama_folder))
        model = FastLanguageModel.get_peft_model(model, r=64, lora_alpha=64, use_rslora=True)
        assert {float(s) for linear in adapted(model) for s in np.asarray(linear.lora.scale)} == {8.0}


def test_a_folder_without_a_tokenizer_loads_with_a_warning(llama_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((llama_folder / name).read_bytes())
    with pytest.warns(UserWarning, match="loads without a tokenizer"):
        _, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path))
    assert tokenizer is None
