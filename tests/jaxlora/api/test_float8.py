"""compute_dtype="float8": a frozen base that multiplies in e4m3, under adapters that do not."""

import jax
import numpy as np
import pytest

from jaxlora import FastLanguageModel, SFTConfig, SFTTrainer
from jaxlora.adapt import LoRAConfig, attach, partition
from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.nn.stack import linear_paths
from jaxlora.select import by_flags
from jaxlora.train.remat import execution
from jaxlora.train.step import value_and_grad
from jaxlora.weights.base import AbstractWeight
from jaxlora.weights.dense import Dense
from jaxlora.weights.float8 import Float8
from jaxlora.weights.int4 import Int4
from pallas_kernels.float8_transposed import float8_transposed
from tests.jaxlora import reference
from tests.tolerances import FLOAT8_LOSS

ROWS = [{"messages": [{"role": "user", "content": f"{n} and {n}?"}, {"role": "assistant", "content": f"{2 * n}"}]} for n in range(8)]


def trained(folder, where, **options):
    """(model, losses) of six steps."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), dtype="float32", use_gradient_checkpointing=False, **options)
    model = FastLanguageModel.get_peft_model(model, r=4)
    args = SFTConfig(output_dir=str(where), per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, save_strategy="no")
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=ROWS, args=args)
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def in_float8(llama_folder, tmp_path_factory):
    return trained(llama_folder, tmp_path_factory.mktemp("float8"), compute_dtype="float8")


def test_every_loss_is_near_that_of_full_precision_and_falls(in_float8, llama_folder, tmp_path):
    _, losses = in_float8
    _, exact = trained(llama_folder, tmp_path)
    np.testing.assert_allclose(losses, exact, rtol=FLOAT8_LOSS)
    assert losses != exact and losses[-1] < losses[0]


def test_the_stored_weights_stay_int4(in_float8):
    leaves = jax.tree.leaves(in_float8[0].state, is_leaf=lambda leaf: isinstance(leaf, AbstractWeight))
    weights = [leaf for leaf in leaves if isinstance(leaf, AbstractWeight)]
    assert {type(leaf) for leaf in weights} == {Float8, Dense} and {type(leaf.base) for leaf in weights if isinstance(leaf, Float8)} == {
        Int4
    }


# Each of another length: what is jitted is not traced again for shapes that it has seen.
@pytest.mark.parametrize(("checkpointing", "length"), [(False, 11), (True, 13), ("unsloth", 17), ("dots", 19)])
def test_input_gradients_find_their_codes_in_the_stack(monkeypatch, checkpointing, length):
    found = []

    def recorded(weights, scale):
        found.extend(weights)
        return float8_transposed(weights, scale)

    monkeypatch.setattr("jaxlora.weights.float8.float8_transposed", recorded)
    loaded = reference.fresh("llama", dtype="float32", load_in_4bit=True, compute_dtype="float8")
    attach(loaded.model, by_flags(linear_paths(loaded.model)), LoRAConfig(r=4))
    graphdef, trainable, frozen = partition(loaded.model)
    ids = np.ones((3, length), np.int32)
    values = loaded.spec.values(loaded.raw_config)
    batch = make_batch([{"input_ids": ids, "attention_mask": ids, "labels": ids}], values, Shape(length, 0), rows=3)
    jax.eval_shape(lambda *trees: value_and_grad(graphdef, *trees, execution(checkpointing)), trainable, frozen, batch)
    assert found and all(weight.layer is not None and weight.codes.ndim == 3 for weight in found)


def test_what_is_merged_is_the_weight_without_its_rounding(in_float8, tmp_path):
    model, _ = in_float8
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained_merged(tmp_path / "float8")
    plain, _ = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), dtype="float32")
    plain.save_pretrained_merged(tmp_path / "plain")
    files = ("model.safetensors", "config.json")
    assert all((tmp_path / "float8" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes() for file in files)


def test_the_banner_says_so(llama_folder, capsys):
    FastLanguageModel.from_pretrained(str(llama_folder), compute_dtype="float8")
    assert "14 Linears multiply in float8" in capsys.readouterr().out


def test_another_compute_dtype_is_refused(llama_folder):
    with pytest.raises(ValueError, match="compute_dtype must be None .* or \"float8\", got 'fp8'"):
        FastLanguageModel.from_pretrained(str(llama_folder), compute_dtype="fp8")


def test_whole_training_in_float8_is_refused_with_the_reason(llama_folder):
    with pytest.raises(ValueError, match="packed as Float8: load it in 16 bits to train it"):
        FastLanguageModel.from_pretrained(str(llama_folder), compute_dtype="float8", full_finetuning=True)
