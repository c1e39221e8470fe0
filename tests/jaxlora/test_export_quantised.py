"""Models whose base is quantised: bitsandbytes' own folders decode to its bits, train, and merge onto the right weights."""

import hashlib
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from conversion.formats import bnb
from conversion.safetensors_io import open_checkpoint
from conversion.safetensors_write import write_safetensors
from jaxlora.adapt import LoRAConfig, attach, partition
from jaxlora.export import save_merged
from jaxlora.load import LoadConfig, load
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import flatten_leaves, iter_layers, linear_paths
from jaxlora.select import by_pattern
from jaxlora.train.optim import OptimConfig, optimizer
from jaxlora.train.step import make_step
from tests.jaxlora import peft_reference as reference
from tests.jaxlora.test_export import assert_same_tensors, base, bf16_base, bits, merged_by_formula, tensors_of, trained
from tests.jaxlora.test_peft_parity import batch

VARIANTS = ("nf4", "nf4-double", "fp4", "fp4-double")


@pytest.mark.parametrize("quant_type", ["int4", "nf4"])
def test_model_quantised_on_loading_merges_onto_the_16_bit_source(quant_type, tmp_path):
    loaded, config, trainable, frozen = trained(bf16_base(), load_in_4bit=True, quant_type=quant_type)
    save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=loaded)
    assert_same_tensors(tensors_of(tmp_path / "m"), merged_by_formula(bf16_base(), trainable, config))


def test_report_compares_the_quantisation_error_with_the_update(tmp_path):
    loaded, config, trainable, frozen = trained(bf16_base(), load_in_4bit=True, quant_type="nf4")
    report = save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=loaded)
    path, pairs = "model.layers.1.mlp.up_proj", {p: np.asarray(leaf) for p, leaf in iter_layers(trainable)}
    weight = tensors_of(bf16_base())[f"{path}.weight"].astype(np.float32)
    error = weight - bnb.dequantise(bnb.quantise_nf4(weight))
    update = config.scale(path) * (pairs[f"{path}.lora_B"] @ pairs[f"{path}.lora_A"])
    assert len(report.quantisation) == report.merged == 14
    assert report.quantisation[path] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(update), rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_that_bitsandbytes_wrote_decode_to_its_own_bits(variant):
    loaded = load(reference.bnb_folder() / variant, LoadConfig(dtype="bfloat16"))
    hashes = {
        path.removesuffix(".weight"): hashlib.sha256(np.asarray(leaf.dequantise()).tobytes()).hexdigest()
        for path, leaf in iter_layers(nnx.to_pure_dict(nnx.state(loaded.model)))
        if path.removesuffix(".weight") in loaded.formats
    }
    assert hashes == json.loads((reference.bnb_folder() / variant / "expected.json").read_text())


def test_no_byte_of_a_quantised_checkpoint_is_read_twice_but_the_small_states(monkeypatch):
    folder, read = reference.bnb_folder() / "nf4-double", []
    kind = type(open_checkpoint(folder))
    real = kind.read
    monkeypatch.setattr(kind, "read", lambda self, name: read.append(name) or real(self, name))
    load(folder)
    twice = {name for name in read if read.count(name) > 1}
    assert len(twice) == 14
    assert all("quant_state" in name for name in twice)


@pytest.mark.parametrize("variant", VARIANTS)
def test_folder_that_bitsandbytes_wrote_trains(variant):
    loaded = load(reference.bnb_folder() / variant, LoadConfig(dtype="float32"))
    attach(loaded.model, by_pattern(linear_paths(loaded.model), reference.ALL), LoRAConfig(r=4, lora_alpha=8.0))
    graphdef, trainable, frozen = partition(loaded.model)
    before = {path: [bits(np.asarray(a)) for a in jax.tree.leaves(leaf)] for path, leaf in flatten_leaves(frozen).items()}
    tx = optimizer(OptimConfig(learning_rate=1e-2, lr_scheduler_type="constant"))
    step, state, losses = make_step(graphdef, tx, Execution()), tx.init(trainable), []
    for i in range(6):
        trainable, state, metrics = step(trainable, state, frozen, batch(loaded, 0), i)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    assert {path: [bits(np.asarray(a)) for a in jax.tree.leaves(leaf)] for path, leaf in flatten_leaves(frozen).items()} == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_onto_a_quantised_folder_is_onto_what_it_decodes_to(variant, tmp_path, caplog):
    folder = reference.bnb_folder() / variant
    loaded, config, trainable, frozen = trained(folder)
    report = save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=loaded)
    stored, pairs = tensors_of(folder), {path: np.asarray(leaf) for path, leaf in iter_layers(trainable)}
    for path in loaded.formats:
        name = f"{path}.weight"
        parts = {bnb.suffix_of(key): stored.pop(key) for key in list(stored) if bnb.weight_of(key) == name}
        weight = bnb.dequantise(bnb.decode(name, stored[name], parts))
        update = np.float32(config.scale(path)) * (pairs[f"{path}.lora_B"] @ pairs[f"{path}.lora_A"])
        stored[name] = (weight.astype(np.float32) + update).astype(ml_dtypes.bfloat16)
    assert_same_tensors(tensors_of(tmp_path / "m"), stored)
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    assert not report.quantisation
    assert "not onto their 16-bit original" in caplog.text


def test_merge_onto_int8_weights_is_onto_what_they_decode_to(tmp_path):
    tensors = tensors_of(bf16_base())
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name].astype(np.float32)
        scale = np.abs(weight).max(1)
        tensors[name] = np.rint(127 * weight / scale[:, None]).astype(np.int8)
        tensors[name.replace("weight", "SCB")] = scale
    (tmp_path / "b").mkdir()
    write_safetensors(tmp_path / "b" / "model.safetensors", tensors)
    shutil.copy(bf16_base() / "config.json", tmp_path / "b")
    loaded, config, trainable, frozen = trained(tmp_path / "b")
    save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=loaded)
    path, pairs = "model.layers.0.mlp.down_proj", {p: np.asarray(leaf) for p, leaf in iter_layers(trainable)}
    weight = tensors[f"{path}.weight"].astype(np.float32) * tensors[f"{path}.SCB"][:, None] * np.float32(1 / 127)
    update = np.float32(config.scale(path)) * (pairs[f"{path}.lora_B"] @ pairs[f"{path}.lora_A"])
    merged = tensors_of(tmp_path / "m")
    expected = (weight.astype(ml_dtypes.bfloat16).astype(np.float32) + update).astype(ml_dtypes.bfloat16)
    assert bits(merged[f"{path}.weight"]) == bits(expected)
    assert set(merged) == set(tensors_of(bf16_base()))


def test_merge_onto_a_named_16_bit_original_is_exact_and_reports_the_difference(tmp_path):
    loaded, config, trainable, frozen = trained(reference.bnb_folder() / "nf4")
    report = save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=loaded, base_folder=bf16_base())
    assert_same_tensors(tensors_of(tmp_path / "m"), merged_by_formula(bf16_base(), trainable, config))
    assert len(report.quantisation) == 14


def test_original_of_another_model_is_refused(tmp_path):
    loaded, _, trainable, frozen = trained(reference.bnb_folder() / "nf4")
    (tmp_path / "b").mkdir()
    write_safetensors(tmp_path / "b" / "model.safetensors", {n: np.roll(a, 7) for n, a in tensors_of(bf16_base()).items()})
    shutil.copy(bf16_base() / "config.json", tmp_path / "b")
    with pytest.raises(ValueError, match="another model"):
        save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=loaded, base_folder=tmp_path / "b")
    with pytest.raises(ValueError, match="do not match|is not the original"):
        save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=loaded, base_folder=base())
    assert not (tmp_path / "m").exists()
