"""What from_pretrained and get_peft_model remember, and what is printed about it."""

import jax
import pytest

from jaxlora import FastLanguageModel


@pytest.mark.parametrize(
    ("loading", "adapting", "holds"),
    [
        ({}, {}, "unsloth"),
        ({"use_gradient_checkpointing": False}, {}, False),
        ({"use_gradient_checkpointing": True}, {"use_gradient_checkpointing": False}, False),
        ({}, {"use_gradient_checkpointing": True}, True),
    ],
)
def test_gradient_checkpointing_is_said_once_and_the_later_word_wins(llama_folder, loading, adapting, holds):
    model, _ = FastLanguageModel.from_pretrained(str(llama_folder), load_in_4bit=False, **loading)
    assert FastLanguageModel.get_peft_model(model, r=4, **adapting).use_gradient_checkpointing == holds


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        ({"load_in_4bit": False, "dtype": "float32"}, "float32 throughout"),
        (
            {"quant_type": "nf4", "dtype": "float32"},
            "14 Linears NF4; the rest float32, Linears among it: 1 lm_head (keeps its precision)",
        ),
        (
            {"dtype": "bfloat16"},
            "14 Linears Int4; the rest bfloat16, Linears among it: 1 lm_head (keeps its precision)",
        ),
    ],
)
def test_the_banner_names_the_true_dtypes(llama_folder, capsys, options, stored):
    model, _ = FastLanguageModel.from_pretrained(str(llama_folder), **options)
    assert capsys.readouterr().out.strip().endswith(f"; {stored}")
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(model.state)}
    assert all(name in dtypes for name in ("bfloat16", "float32") if name in stored)


def test_saving_a_model_that_was_trained_whole_says_so(llama_folder, tmp_path, capsys):
    model, tokenizer = FastLanguageModel.from_pretrained(str(llama_folder), full_finetuning=True)
    model.save_pretrained(tmp_path)
    said = capsys.readouterr().out.splitlines()[-1]
    assert "tensors that were trained whole saved in place of the original weights" in said and "adapter" not in said
