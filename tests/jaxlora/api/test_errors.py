"""Every mistake has its message: what was expected, what came, what is nearest."""

import json

import numpy as np
import pytest

from jaxlora import FastLanguageModel, FastModel, FastVisionModel, SFTConfig, SFTTrainer, UnslothVisionDataCollator, train_on_responses_only
from jaxlora.data.chat import Encoded
from tests.jaxlora.api.conftest import text_row, vision_row


@pytest.fixture(scope="module")
def base(llama_folder):
    return FastLanguageModel.from_pretrained(str(llama_folder), load_in_4bit=False)


@pytest.fixture
def fresh(llama_folder):
    return FastLanguageModel.from_pretrained(str(llama_folder), load_in_4bit=False)


@pytest.fixture(scope="module")
def adapted(llama_folder):
    model, tokenizer = FastLanguageModel.from_pretrained(str(llama_folder), load_in_4bit=False)
    return FastLanguageModel.get_peft_model(model, r=4), tokenizer


@pytest.fixture(scope="module")
def vision(qwen2_vl_folder):
    model, processor = FastVisionModel.from_pretrained(str(qwen2_vl_folder), load_in_4bit=False)
    return FastVisionModel.get_peft_model(model, r=4, finetune_vision_layers=False), processor


class TestLoading:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"load_in_4bits": True}, "'load_in_4bits'; did you mean 'load_in_4bit'"),
            ({"max_seq_len": 10}, "'max_seq_len'; did you mean 'max_seq_length'"),
            ({"full_finetune": True}, "'full_finetune'; did you mean 'full_finetuning'"),
        ],
    )
    def test_a_typo_names_the_nearest_argument(self, llama_folder, arguments, message):
        with pytest.raises(TypeError, match=f"from_pretrained got unknown arguments: {message}"):
            FastModel.from_pretrained(str(llama_folder), **arguments)

    def test_repository_code_never_runs(self, llama_folder):
        with pytest.raises(ValueError, match="jaxlora never runs code from a model repository"):
            FastModel.from_pretrained(str(llama_folder), trust_remote_code=True)

    @pytest.mark.parametrize("option", ["load_in_8bit", "load_in_fp8", "fast_inference"])
    def test_what_would_change_the_result_is_refused(self, llama_folder, option):
        with pytest.raises(NotImplementedError, match=f"not available: {option}=True"):
            FastModel.from_pretrained(str(llama_folder), **{option: True})

    def test_an_unknown_architecture_names_the_nearest(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vk"}))
        with pytest.raises(NotImplementedError, match="model_type 'qwen2_vk' is not modelled; did you mean 'qwen2_vl'"):
            FastModel.from_pretrained(str(tmp_path))

    def test_a_folder_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=f"there is no folder '{tmp_path}/nothing'"):
            FastModel.from_pretrained(str(tmp_path / "nothing"))

    def test_a_dtype_that_is_none_is_an_error(self, llama_folder):
        with pytest.raises(ValueError, match="got 'bfloat'; did you mean 'bfloat16'"):
            FastModel.from_pretrained(str(llama_folder), dtype="bfloat")


class TestAdapting:
    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ({"lora_aplha": 3}, TypeError, "get_peft_model got unknown arguments: 'lora_aplha'; did you mean 'lora_alpha'"),
            ({"finetune_mlp_module": False}, TypeError, "'finetune_mlp_module'; did you mean 'finetune_mlp_modules'"),
            ({"target_modules": ["q_porj"]}, ValueError, "'q_porj'; did you mean 'q_proj'"),
            ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, ValueError, "'lm_haed' names no module"),
            ({"r": 0}, ValueError, "r must be a positive int, got 0"),
            ({"lora_dropout": 1.5}, ValueError, r"lora_dropout must be in \[0, 1\), got 1.5"),
            ({"init_lora_weights": "gausian"}, ValueError, "did you mean 'gaussian'"),
            ({"bias": "all"}, NotImplementedError, "bias='all' is not available"),
            ({"use_dora": True}, NotImplementedError, "not available: use_dora=True"),
            ({"layers_to_transform": [9]}, ValueError, r"layers \[9\] hold no selected Linear"),
        ],
    )
    def test_a_mistake_is_told(self, base, arguments, kind, message):
        with pytest.raises(kind, match=message):
            FastLanguageModel.get_peft_model(base[0], **arguments)

    def test_vision_only_on_a_text_model_is_an_error(self, base):
        with pytest.raises(ValueError, match="the flags select nothing"):
            FastVisionModel.get_peft_model(base[0], finetune_language_layers=False)

    def test_a_second_call_on_a_vision_model_is_an_error(self, vision):
        with pytest.raises(RuntimeError, match="this model has LoRA adapters already"):
            FastVisionModel.get_peft_model(vision[0], r=4)

    def test_the_same_call_on_a_language_model_changes_nothing(self, adapted, caplog):
        assert FastLanguageModel.get_peft_model(adapted[0], r=4) is adapted[0]
        assert "these adapters already" in caplog.text

    @pytest.mark.parametrize(
        "change", [{"r": 8}, {"r": 4, "target_modules": ["q_proj"]}, {"r": 4, "random_state": 1}, {"r": 4, "use_rslora": True}]
    )
    def test_another_call_on_a_language_model_is_an_error(self, adapted, change):
        with pytest.raises(TypeError, match="an adapter of other settings"):
            FastLanguageModel.get_peft_model(adapted[0], **change)

    def test_the_tokenizer_is_not_the_model(self, adapted):
        with pytest.raises(TypeError, match="for_inference takes the model"):
            FastLanguageModel.for_inference(adapted[1])

    def test_the_language_class_leaves_a_tower_alone(self, qwen2_vl_folder):
        model, _ = FastLanguageModel.from_pretrained(str(qwen2_vl_folder), load_in_4bit=False)
        FastLanguageModel.get_peft_model(model, r=4, target_modules=None)
        assert {tower for tower, _ in model.selection.counts} == {"language"}


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ({"learning_rat": 1.0}, TypeError, "'learning_rat'; did you mean 'learning_rate'"),
            ({"max_step": 3}, TypeError, "'max_step'; did you mean 'max_steps'"),
            ({"optim": "sgd"}, ValueError, "optim must be one of"),
            ({"save_strategy": "step"}, ValueError, "got 'step'; did you mean 'steps'"),
            ({"max_steps": 0}, ValueError, "the run has no steps"),
            ({"per_device_train_batch_size": 0, "logging_steps": 0}, ValueError, "(?s)per_device_train_batch_size.*logging_steps"),
        ],
    )
    def test_a_mistake_is_told(self, arguments, kind, message):
        with pytest.raises(kind, match=message):
            SFTConfig(**arguments)

    def test_an_argument_without_effect_is_taken(self):
        assert SFTConfig(bf16=True, report_to="none", max_steps=4).max_steps == 4

    def test_older_names_are_taken(self):
        assert SFTConfig(evaluation_strategy="epoch").eval_strategy == "epoch"


class TestTraining:
    def test_a_typo_names_the_nearest_argument(self, adapted):
        with pytest.raises(TypeError, match="SFTTrainer got unknown arguments: 'eval_datasets'; did you mean 'eval_dataset'"):
            SFTTrainer(adapted[0], train_dataset=[text_row(0)], tokenizer=adapted[1], eval_datasets=[])

    def test_a_typo_of_the_collator_is_an_error(self, vision):
        with pytest.raises(TypeError, match="resise"):
            UnslothVisionDataCollator(*vision, resise="max")

    def test_a_tokenizer_is_no_processor(self, adapted):
        with pytest.raises(TypeError, match="this collator is only for image models"):
            UnslothVisionDataCollator(*adapted)

    @pytest.mark.parametrize("rows", [[], None])
    def test_a_dataset_must_have_rows(self, adapted, rows):
        with pytest.raises(ValueError, match="the dataset is empty|train_dataset is missing"):
            SFTTrainer(adapted[0], train_dataset=rows, tokenizer=adapted[1])

    def test_a_row_without_an_answer_is_an_error(self, adapted):
        rows = [{"messages": [{"role": "user", "content": "no answer"}]}]
        with pytest.raises(ValueError, match="row 0: no assistant turn to train on; the roles are \\['user'\\]"):
            SFTTrainer(adapted[0], SFTConfig(assistant_only_loss=True), rows, tokenizer=adapted[1])

    def test_answers_that_are_all_cut_off_are_an_error(self, adapted):
        with pytest.raises(ValueError, match="not one of the 2 rows has a labelled token"):
            SFTTrainer(adapted[0], SFTConfig(assistant_only_loss=True, max_length=4), [text_row(0), text_row(1)], tokenizer=adapted[1])

    def test_markers_that_never_match_are_an_error_that_names_one(self, adapted):
        trainer = SFTTrainer(adapted[0], train_dataset=[text_row(0)], tokenizer=adapted[1])
        with pytest.raises(ValueError, match="ASSISTANT:"):
            train_on_responses_only(trainer, "USER:", "ASSISTANT:")

    def test_every_row_that_cannot_be_read_is_listed(self, adapted):
        rows = [text_row(0), {"txt": "a"}, {"messages": "hello"}]
        with pytest.raises(ValueError, match="(?s)2 of 3 rows cannot be read.*row 1.*row 2"):
            SFTTrainer(adapted[0], train_dataset=rows, tokenizer=adapted[1])

    def test_nothing_to_train_is_an_error(self, base):
        with pytest.raises(ValueError, match="nothing is trained: call get_peft_model first"):
            SFTTrainer(base[0], train_dataset=[text_row(0)], tokenizer=base[1])

    def test_text_rows_need_a_tokenizer(self, adapted):
        with pytest.raises(ValueError, match="text rows need a tokenizer"):
            SFTTrainer(adapted[0], train_dataset=[text_row(0)])

    def test_an_image_that_is_none_is_an_error_that_names_the_row(self, vision):
        rows = [vision_row(0), vision_row(1)]
        rows[1]["messages"][1]["content"][1]["image"] = b"these bytes are no picture"
        with pytest.raises(ValueError, match="row 1.*image"):
            SFTTrainer(vision[0], train_dataset=rows, data_collator=UnslothVisionDataCollator(*vision))

    def test_a_foreign_tokenizer_is_an_error_and_the_model_comes_back(self, adapted, tmp_path):
        model, tokenizer = adapted
        trainer = SFTTrainer(
            model, SFTConfig(max_steps=1, output_dir=str(tmp_path)), [text_row(0)], tokenizer=tokenizer
        )  # fmt: skip
        ids = np.array([5, 400, 6])
        trainer.train_source.encoded[:] = [Encoded(input_ids=ids, labels=ids)]
        trainer.train_source = trainer.train_source.relabelled([ids])
        with pytest.raises(ValueError, match="hold token 400, but the model's vocabulary has 400; is this the model's own tokenizer"):
            trainer.train()
        assert model.trainable

    def test_a_model_that_a_trainer_holds_refuses_every_use(self, fresh, tmp_path):
        model = FastLanguageModel.get_peft_model(fresh[0], r=4)
        trainable = model.lend("a running trainer")
        uses = [
            lambda: model(input_ids=np.array([[5]])),
            lambda: model.generate(input_ids=np.array([[5]])),
            lambda: model.save_pretrained(tmp_path / "lora"),
            lambda: model.save_pretrained_merged(tmp_path / "merged"),
        ]
        for use in uses:
            with pytest.raises(RuntimeError, match="the trained parameters are with a running trainer"):
                use()
        model.give_back(trainable)
        assert model.trainable is trainable

    def test_resuming_without_a_checkpoint_is_an_error(self, adapted, tmp_path):
        trainer = SFTTrainer(adapted[0], SFTConfig(max_steps=1, output_dir=str(tmp_path)), [text_row(0)], tokenizer=adapted[1])
        with pytest.raises(ValueError, match="holds no complete checkpoint"):
            trainer.train(resume_from_checkpoint=True)

    def test_evaluating_nothing_is_an_error(self, adapted, tmp_path):
        with pytest.raises(ValueError, match="there is no eval_dataset"):
            SFTTrainer(adapted[0], SFTConfig(output_dir=str(tmp_path)), [text_row(0)], tokenizer=adapted[1]).evaluate()

    def test_packing_with_a_collator_is_refused(self, vision):
        with pytest.raises(NotImplementedError, match="packing=True with a data_collator"):
            SFTTrainer(vision[0], SFTConfig(packing=True), [vision_row(0)], data_collator=UnslothVisionDataCollator(*vision))


class TestSaving:
    def test_a_model_without_an_adapter_has_none_to_save(self, base, tmp_path):
        with pytest.raises(ValueError, match="has no adapter to save"):
            base[0].save_pretrained(tmp_path / "lora")

    def test_another_save_method_is_refused_with_the_way_there(self, adapted, tmp_path):
        with pytest.raises(NotImplementedError, match="'merged_4bit' is not available; did you mean 'merged_16bit'.*merge to 16 bits"):
            adapted[0].save_pretrained_merged(tmp_path / "out", save_method="merged_4bit")

    def test_gguf_says_what_to_run(self, adapted):
        with pytest.raises(NotImplementedError, match="llama.cpp/convert_hf_to_gguf.py out"):
            adapted[0].save_pretrained_gguf("out")


class TestGenerating:
    def test_inputs_that_no_model_takes_are_named(self, adapted):
        with pytest.raises(ValueError, match="'attention_masks'; did you mean 'attention_mask'"):
            adapted[0].generate(input_ids=np.array([[5, 6]]), attention_masks=np.array([[1, 1]]))

    @pytest.mark.parametrize("option", [{"num_beams": 4}, {"num_return_sequences": 2}, {"repetition_penalty": 1.2}])
    def test_options_that_would_change_the_result_are_refused(self, adapted, option):
        with pytest.raises(NotImplementedError, match="generate: not available"):
            adapted[0].generate(input_ids=np.array([[5, 6]]), **option)

    def test_at_least_one_new_token(self, adapted):
        with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
            adapted[0].generate(input_ids=np.array([[5, 6]]), max_new_tokens=0)

    def test_the_output_names_what_it_has(self, adapted):
        with pytest.raises(AttributeError, match=r"the output has \['logits'\], not 'los'"):
            _ = adapted[0](input_ids=np.array([[5, 6]])).los
