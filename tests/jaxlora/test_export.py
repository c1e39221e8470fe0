"""What is written: adapters that PEFT reads as they were trained, and merged models that equal the formula bit for bit."""

import dataclasses
import functools
import json
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.peft_format import read_adapter
from conversion.peft_targets import containers, selects, target_modules
from conversion.safetensors_io import open_checkpoint
from conversion.safetensors_write import write_safetensors
from jaxlora.adapt import LoRAConfig, attach, attach_from, partition, untie
from jaxlora.export import save_adapter, save_merged
from jaxlora.load import LoadConfig, load
from jaxlora.nn.stack import flatten_leaves, iter_layers, linear_paths, nest
from jaxlora.select import by_pattern
from jaxlora.train.step import merge_trees
from tests.jaxlora import peft_reference as reference
from tests.jaxlora.reference import reference_folder, run_oracle
from tests.jaxlora.test_peft_parity import batch, forward
from tests.tolerances import LOGITS_FP32

TEXT = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
OPTIONS = {
    "plain": LoRAConfig(r=4, lora_alpha=8.0, init_lora_weights=False),
    "rslora": LoRAConfig(r=4, lora_alpha=3.0, use_rslora=True, init_lora_weights=False),
    "patterns": LoRAConfig(
        r=4, lora_alpha=6.0, rank_pattern={"q_proj": 2, "unused": 9}, alpha_pattern={".*up_proj": 5.0}, init_lora_weights=False
    ),
}
# Trained whole beside LoRA; the base is tied, and only one of the two uses of its table changes.
WHOLE = ("lm_head", "input_layernorm")
SELECTED = {
    "plain": reference.ALL,
    "rslora": r"model\.layers\.1\..*",
    "patterns": ["q_proj", "up_proj", "lm_head"],
}


def trained(folder, name="plain", **options):
    """A model of that folder with an adapter whose A and B are random: (loaded, config, trainable, frozen)."""
    loaded, config = load(folder, LoadConfig(**{"dtype": "float32", **options})), OPTIONS[name]
    attach(loaded.model, by_pattern(linear_paths(loaded.model), SELECTED[name]), config)
    return loaded, config, *partition(loaded.model)[1:]


def trained_whole(folder):
    """As `trained`, with `WHOLE` trained too, away from the base's values."""
    loaded, config = load(folder, LoadConfig(dtype="float32")), dataclasses.replace(OPTIONS["plain"], modules_to_save=WHOLE)
    untie(loaded.model)
    attach(loaded.model, by_pattern(linear_paths(loaded.model), ["q_proj", "down_proj"]), config)
    _, trainable, frozen = partition(loaded.model, WHOLE)
    keys = iter(jax.random.split(jax.random.key(0), 99))
    return loaded, config, jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), trainable), frozen


def base():
    return reference.peft_folder() / "base"


def bf16_base():
    return reference.bnb_folder() / "base"


def tensors_of(folder):
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def merged_by_formula(folder, trainable, config):
    """dtype(fp32(W) + s·(B·A)), written out."""
    tensors, pairs = tensors_of(folder), {path: np.asarray(leaf) for path, leaf in iter_layers(trainable)}
    for path in [p.removesuffix(".lora_A") for p in pairs if p.endswith("lora_A")]:
        weight = tensors[f"{path}.weight"]
        update = np.float32(config.scale(path)) * (pairs[f"{path}.lora_B"] @ pairs[f"{path}.lora_A"])
        tensors[f"{path}.weight"] = (weight.astype(np.float32) + update).astype(weight.dtype)
    return tensors


def assert_same_tensors(ours, expected):
    assert set(ours) == set(expected)
    assert [name for name in expected if bits(ours[name]) != bits(expected[name])] == []


@pytest.mark.parametrize("name", OPTIONS)
def test_adapter_read_again_has_the_same_bits_ranks_and_scales(name, tmp_path):
    loaded, config, trainable, frozen = trained(base(), name)
    save_adapter(tmp_path, trainable=trainable, frozen=frozen, config=config, loaded=loaded)
    again = load(base(), LoadConfig(dtype="float32"))
    read = attach_from(again.model, tmp_path, again.spec.rules)
    ours, theirs = (
        flatten_leaves(merge_trees(*trees)) for trees in ((trainable, frozen), partition(again.model, read.modules_to_save)[1:])
    )
    assert set(ours) == set(theirs)
    assert all(np.array_equal(a, b) for p in ours for a, b in zip(jax.tree.leaves(ours[p]), jax.tree.leaves(theirs[p]), strict=True))


def test_adapter_says_what_it_was_trained_with(tmp_path):
    loaded, config, trainable, frozen = trained(base(), "patterns")
    save_adapter(tmp_path, trainable=trainable, frozen=frozen, config=config, loaded=loaded, base_model_name_or_path="someone/tiny")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    said = {
        key: fields[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "peft_type", "bias")
    }
    assert said == {
        "r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*up_proj": 5},
        "base_model_name_or_path": "someone/tiny", "peft_type": "LORA", "bias": "none",
    }  # fmt: skip
    assert sorted(fields["target_modules"]) == ["lm_head", "q_proj", "up_proj"]


def test_norms_trained_whole_are_named_so_that_peft_finds_no_other(tmp_path):
    loaded = load(base(), LoadConfig(dtype="float32"))
    attach(loaded.model, by_pattern(linear_paths(loaded.model), ["q_proj"]), LoRAConfig())
    _, trainable, frozen = partition(loaded.model, ["input_layernorm"])
    save_adapter(tmp_path, trainable=trainable, frozen=frozen, config=LoRAConfig(), loaded=loaded)
    stored = read_adapter(tmp_path)
    assert stored.config.modules_to_save == ("input_layernorm",)
    assert sorted(stored.modules_to_save) == [f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)]


def test_adapter_with_another_alpha_than_it_was_trained_with_is_not_written(tmp_path):
    loaded, _, trainable, frozen = trained(base())
    with pytest.raises(ValueError, match="not the one"):
        save_adapter(tmp_path / "a", trainable=trainable, frozen=frozen, config=LoRAConfig(r=4, lora_alpha=9.0), loaded=loaded)
    assert not (tmp_path / "a").exists()


def test_adapter_that_is_not_finite_is_not_written(tmp_path):
    loaded, config, trainable, frozen = trained(base())
    with pytest.raises(ValueError, match="not finite"):
        save_adapter(tmp_path / "a", trainable=jax.tree.map(lambda a: a * jnp.inf, trainable), frozen=frozen, config=config, loaded=loaded)
    assert not (tmp_path / "a").exists()


LEAVES = ("layers.{}.attn.q_proj", "layers.{}.mlp.up_proj", "blocks.{}.attn.proj", "blocks.{}.mlp.0")
LINEARS = [f"model.{leaf.format(i)}" for leaf in LEAVES for i in range(12)]
MODULES = containers([*(f"{path}.weight" for path in LINEARS), "model.patch_embed.proj.weight", "model.norm.weight"])


@settings(max_examples=60, deadline=None)
@given(st.sets(st.sampled_from(LINEARS), min_size=1))
def test_target_modules_select_exactly_what_was_adapted_among_all_modules(adapted):
    assert selects(target_modules(adapted, MODULES), MODULES) == adapted


def test_target_modules_are_kept_as_given_where_they_select_the_same():
    adapted = [path for path in LINEARS if path.endswith("q_proj")]
    assert target_modules(adapted, MODULES, r".*layers.*\.q_proj") == r".*layers.*\.q_proj"
    assert target_modules(adapted, MODULES, r".*layers.*") == ("q_proj",)


def test_target_modules_are_suffixes_where_these_suffice():
    adapted = [path for path in LINEARS if path.endswith(("q_proj", "up_proj"))]
    assert target_modules(adapted, MODULES) == ("q_proj", "up_proj")


@pytest.mark.parametrize("model_type", TEXT)
def test_merge_without_an_adapter_is_byte_identical(model_type, tmp_path):
    folder = reference_folder(model_type)
    loaded = load(folder, LoadConfig(dtype="float32"))
    _, trainable, frozen = partition(loaded.model)
    save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=loaded)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("model_type", TEXT)
def test_every_tensor_comes_back_from_the_device_bit_for_bit(model_type, tmp_path):
    folder = reference_folder(model_type)
    loaded = load(folder, LoadConfig(dtype="float32"))
    _, trainable, frozen = partition(loaded.model, full=True)
    report = save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=loaded)
    assert report.overwritten == len(loaded.plan.placed)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "rslora"])
@pytest.mark.parametrize("folder", [base, bf16_base], ids=["fp32", "bf16"])
def test_merged_tensors_equal_the_formula_and_the_others_their_source(folder, name, dtype, tmp_path):
    loaded, config, trainable, frozen = trained(folder(), name, dtype=dtype)
    save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=loaded)
    assert_same_tensors(tensors_of(tmp_path / "m"), merged_by_formula(folder(), trainable, config))


def sharded(folder, target):
    """The model in two shards with an index, and small files beside it."""
    target.mkdir()
    tensors = tensors_of(folder)
    halves = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        write_safetensors(target / name, half)
    weight_map = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.copy(folder / "config.json", target)
    (target / "tokenizer.json").write_text("{}")
    (target / "modeling_tiny.py").write_text("raise SystemExit")
    return target


def test_shards_index_and_small_files_are_the_sources_and_code_is_not_copied(tmp_path):
    folder = sharded(base(), tmp_path / "base")
    loaded, config, trainable, frozen = trained(folder)
    save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=loaded)
    assert {p.name for p in (tmp_path / "m").iterdir()} == {p.name for p in folder.iterdir()} - {"modeling_tiny.py"}
    for name in ("model.safetensors.index.json", "tokenizer.json", "config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (folder / name).read_bytes()
    assert_same_tensors(tensors_of(tmp_path / "m"), merged_by_formula(folder, trainable, config))


def test_adapted_head_of_a_tied_model_is_written_beside_the_embedding(tmp_path):
    loaded, config, trainable, frozen = trained(base(), "patterns")
    save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=loaded)
    merged, original = tensors_of(tmp_path / "m"), tensors_of(base())["model.embed_tokens.weight"]
    a, b = (np.asarray(trainable["lm_head"][leaf]) for leaf in ("lora_A", "lora_B"))
    assert bits(merged["model.embed_tokens.weight"]) == bits(original)
    assert bits(merged["lm_head.weight"]) == bits(original + np.float32(config.scale("lm_head")) * (b @ a))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids="+".join)
def test_head_and_embedding_trained_apart_are_both_written(names, tmp_path):
    loaded = load(base(), LoadConfig(dtype="float32"))
    untie(loaded.model)
    _, trainable, frozen = partition(loaded.model, names)
    save_merged(tmp_path / "m", trainable=jax.tree.map(lambda a: a + 1, trainable), frozen=frozen, loaded=loaded)
    merged, original = tensors_of(tmp_path / "m"), tensors_of(base())["model.embed_tokens.weight"]
    for name in ("lm_head", "embed_tokens"):
        path = "lm_head.weight" if name == "lm_head" else "model.embed_tokens.weight"
        assert bits(merged[path]) == bits(original + np.float32(name in names))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False


def test_head_that_a_tied_file_holds_as_well_follows_the_embedding(tmp_path):
    tensors = tensors_of(base())
    (tmp_path / "b").mkdir()
    write_safetensors(tmp_path / "b" / "model.safetensors", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    shutil.copy(base() / "config.json", tmp_path / "b")
    loaded = load(tmp_path / "b", LoadConfig(dtype="float32"))
    _, trainable, frozen = partition(loaded.model, full=True)
    save_merged(tmp_path / "m", trainable=jax.tree.map(lambda a: a * 2, trainable), frozen=frozen, loaded=loaded)
    merged = tensors_of(tmp_path / "m")
    assert bits(merged["lm_head.weight"]) == bits(merged["model.embed_tokens.weight"]) == bits(tensors["model.embed_tokens.weight"] * 2)


def test_merge_that_overflows_names_the_tensor_and_leaves_nothing(tmp_path):
    tensors = {name: array.astype(np.float16) for name, array in tensors_of(base()).items()}
    (tmp_path / "b").mkdir()
    write_safetensors(tmp_path / "b" / "model.safetensors", tensors)
    shutil.copy(base() / "config.json", tmp_path / "b")
    loaded, _, trainable, frozen = trained(tmp_path / "b")
    large = flatten_leaves(trainable)
    large["model.layers.0:2:1.mlp.up_proj.lora_B"] *= 1e6
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight: .* not finite in float16"):
        save_merged(tmp_path / "m", trainable=nest(large), frozen=frozen, loaded=loaded)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_adapter_without_its_place_in_the_source_is_an_error(tmp_path):
    loaded, _, trainable, frozen = trained(base())
    extra = {"other": {"proj": {leaf: trainable["model"]["layers"]["0:2:1"]["mlp"]["up_proj"][leaf][0] for leaf in ("lora_A", "lora_B")}}}
    scale = {"other": {"proj": {"lora_scale": jnp.float32(1)}}}
    with pytest.raises(ValueError, match=r"(?s)1 of 15 trained tensors.*other\.proj\.weight"):
        save_merged(tmp_path / "m", trainable=merge_trees(trainable, extra), frozen=merge_trees(frozen, scale), loaded=loaded)


def test_merge_onto_its_own_source_is_refused():
    loaded, _, trainable, frozen = trained(base())
    with pytest.raises(ValueError, match="reads from"):
        save_merged(base(), trainable=trainable, frozen=frozen, loaded=loaded, overwrite=True)


def test_progress_ends_at_the_whole(tmp_path):
    loaded, _, trainable, frozen = trained(base())
    seen = []
    save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=loaded, progress=lambda *step: seen.append(step))
    assert len(seen) == len(tensors_of(base()))
    assert seen[-1][1] == seen[-1][2] == sum(array.nbytes for array in tensors_of(base()).values())


LIVE = {f"{model_type}-plain": (model_type, "plain") for model_type in TEXT}
LIVE |= {f"tiny-{name}": ("tiny", name) for name in (*OPTIONS, "whole")}


def live_base(model_type):
    return base() if model_type == "tiny" else reference_folder(model_type)


@functools.cache
def live_logits():
    """Writes every adapter and every merged model, and has the oracle compute all their logits in one process."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxlora-live-"))
    with np.load(reference.peft_folder() / "batches.npz") as file:
        np.savez(folder / "inputs.npz", **{name: file[name][0] for name in ("input_ids", "attention_mask")})
    jobs, ours = {}, {}
    for case, (model_type, name) in LIVE.items():
        loaded, config, trainable, frozen = trained_whole(base()) if name == "whole" else trained(live_base(model_type), name)
        save_adapter(folder / f"{case}-adapter", trainable=trainable, frozen=frozen, config=config, loaded=loaded)
        save_merged(folder / f"{case}-merged", trainable=trainable, frozen=frozen, loaded=loaded)
        both = {"adapter": (live_base(model_type), folder / f"{case}-adapter"), "merged": (folder / f"{case}-merged", None)}
        for kind, (model, adapter) in both.items():
            jobs[f"{case}-{kind}"] = {"base": str(model), "adapter": adapter and str(adapter), "inputs": str(folder / "inputs.npz")}
        micro = jax.tree.map(lambda a: jnp.asarray(a[0]), batch(loaded, 0))
        ours[case] = np.asarray(forward(nnx.graphdef(loaded.model), merge_trees(trainable, frozen), micro))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_oracle("compute_logits.py", folder / "jobs.json", folder)
    theirs = {}
    for job in jobs:
        with np.load(folder / f"{job}.npz") as file:
            theirs[job] = file["logits"]
    with np.load(folder / "inputs.npz") as file:
        return ours, theirs, file["attention_mask"].astype(bool)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["adapter", "merged"])
@pytest.mark.parametrize("case", LIVE)
def test_what_we_write_gives_our_logits_in_peft_and_transformers(case, kind):
    ours, theirs, mask = live_logits()
    assert np.abs(ours[case] - theirs[f"{case}-{kind}"])[mask].max() <= LOGITS_FP32
