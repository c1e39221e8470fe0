"""The public names and their arguments: scripts depend on them."""

import inspect
import pathlib
import re

import pytest

import jaxlora
from jaxlora.models import registry

NAMES = {
    "FastLanguageModel",
    "FastModel",
    "FastVisionModel",
    "Model",
    "SFTConfig",
    "SFTTrainer",
    "TrainingArguments",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "UnslothVisionDataCollator",
    "VisionDataCollator",
    "train_on_responses_only",
}
POSITIONAL = {
    "FastModel.from_pretrained": "model_name max_seq_length dtype load_in_4bit",
    "FastVisionModel.from_pretrained": "model_name max_seq_length dtype load_in_4bit",
    "FastLanguageModel.from_pretrained": "model_name max_seq_length dtype load_in_4bit",
    "FastVisionModel.get_peft_model": "model r target_modules lora_alpha lora_dropout bias finetune_vision_layers finetune_language_layers "
    "finetune_attention_modules finetune_mlp_modules",
    "FastLanguageModel.get_peft_model": "model r target_modules lora_alpha",
    "FastVisionModel.for_training": "model use_gradient_checkpointing",
    "FastVisionModel.for_inference": "model",
    "SFTTrainer": "model args train_dataset eval_dataset",
    "UnslothVisionDataCollator": "model processor max_seq_length formatting_func resize ignore_index train_on_responses_only "
    "instruction_part response_part force_match num_proc last_response_only completion_only_loss pad_to_multiple_of "
    "resize_dimension snap_to_patch_size",
    "train_on_responses_only": "trainer instruction_part response_part force_match",
    "Model.save_pretrained": "self folder",
    "Model.save_pretrained_merged": "self folder tokenizer save_method",
    "Model.push_to_hub_merged": "self repo_id tokenizer save_method token",
    "Model.generate": "self",
    "SFTTrainer.train": "self resume_from_checkpoint",
}
KEYWORDS = {
    "FastVisionModel.from_pretrained": "full_finetuning quant_type compute_dtype quantization_config token revision trust_remote_code "
    "use_gradient_checkpointing",
    "FastVisionModel.get_peft_model": "finetune_last_n_layers layers_to_transform layers_pattern use_gradient_checkpointing random_state "
    "use_rslora modules_to_save init_lora_weights rank_pattern alpha_pattern",
    "SFTTrainer": "tokenizer processing_class data_collator formatting_func dataset_text_field max_seq_length packing callbacks optimizers",
    "UnslothVisionDataCollator": "image_root",
    "train_on_responses_only": "last_response_only tokenizer return_function num_proc",
    "Model.generate": "max_new_tokens seed eos_token_id",
    "Model.save_pretrained_merged": "base_folder",
}
# Where Unsloth's defaults decide what a script without the argument does.
DEFAULTS = {
    "FastModel.from_pretrained": {
        "max_seq_length": 2048,
        "load_in_4bit": True,
        "full_finetuning": False,
        "trust_remote_code": False,
        "use_gradient_checkpointing": "unsloth",
    },
    "FastModel.get_peft_model": {
        "r": 16,
        "target_modules": None,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "random_state": 3407,
        "use_rslora": False,
        "finetune_vision_layers": True,
        "finetune_language_layers": True,
        "finetune_attention_modules": True,
        "finetune_mlp_modules": True,
        "use_gradient_checkpointing": None,
    },
    "FastLanguageModel.get_peft_model": {
        "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    },
    "UnslothVisionDataCollator": {"resize": "min", "ignore_index": -100, "train_on_responses_only": False, "resize_dimension": 0},
    "Model.save_pretrained_merged": {"save_method": "merged_16bit"},
}
CONFIG_DEFAULTS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.001,
    "seed": 3407,
    "optim": "adamw_8bit",
    "learning_rate": 5e-5,
    "logging_steps": 1,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
}


def find(name):
    found = jaxlora
    for part in name.split("."):
        found = getattr(found, part)
    return found


def names_of(name, *kinds):
    return [p.name for p in inspect.signature(find(name)).parameters.values() if p.kind in kinds]


def test_the_names_are_these():
    assert set(jaxlora.__all__) == NAMES
    assert all(inspect.getdoc(find(name)) for name in NAMES)


@pytest.mark.parametrize("name", POSITIONAL)
def test_arguments_keep_their_order(name):
    assert names_of(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) == POSITIONAL[name].split()


@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_are_these(name):
    assert set(names_of(name, inspect.Parameter.KEYWORD_ONLY)) == set(KEYWORDS[name].split())


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_unsloths(name):
    parameters = inspect.signature(find(name)).parameters
    assert {key: parameters[key].default for key in DEFAULTS[name]} == DEFAULTS[name]


def test_training_defaults_are_unsloths():
    config = jaxlora.SFTConfig()
    assert {key: getattr(config, key) for key in CONFIG_DEFAULTS} == CONFIG_DEFAULTS


def test_one_class_has_several_names():
    assert jaxlora.VisionDataCollator is jaxlora.UnslothVisionDataCollator
    assert jaxlora.TrainingArguments is jaxlora.SFTConfig


def test_the_readme_names_every_architecture():
    [row] = re.findall(r"^\| architectures \|(.*)\|$", pathlib.Path(__file__).parents[1].joinpath("README.md").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", row)) == sorted(registry.MODELS)
