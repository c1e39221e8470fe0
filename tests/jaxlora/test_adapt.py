"""Attaching adapters: fresh ones, which change nothing and are drawn by path, and those of a PEFT folder, read without mercy."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from conversion.peft_format import read_adapter, write_adapter
from conversion.rules import Rename, Rules, Spelling, same
from conversion.safetensors_io import open_single
from conversion.safetensors_write import write_safetensors
from jaxlora.adapt import LoRAConfig, adapter_tensors, attach, attach_from, partition, untie
from jaxlora.load import LoadConfig, load
from jaxlora.nn.stack import flatten, linear_paths
from jaxlora.select import by_pattern
from tests.jaxlora import peft_reference as reference
from tests.jaxlora.test_peft_parity import batch, forward

WEIGHTS = "adapter_model.safetensors"


def base(**options):
    return load(reference.peft_folder() / "base", LoadConfig(dtype="float32", **options))


def adapter(case="lora", which="random"):
    return reference.peft_folder() / case / which


def logits(model, loaded):
    return np.asarray(forward(*nnx.split(model), jax.tree.map(lambda a: jax.numpy.asarray(a[0]), batch(loaded, 0))))


def rewritten(tmp_path, change):
    """A copy of an adapter whose tensors went through ``change``."""
    source = open_single(adapter(), WEIGHTS)
    shutil.copytree(adapter(), tmp_path / "adapter")
    write_safetensors(tmp_path / "adapter" / WEIGHTS, change({name: source.read(name) for name in source.names()}))
    return tmp_path / "adapter"


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}, {"load_in_4bit": True, "quant_type": "nf4"}])
def test_fresh_adapter_changes_no_bit_of_the_logits(options):
    loaded = base(**options)
    before = logits(loaded.model, loaded)
    attach(loaded.model, by_pattern(linear_paths(loaded.model), [*reference.ALL, "lm_head"]), LoRAConfig())
    assert np.array_equal(logits(loaded.model, loaded), before)


def test_selecting_other_layers_changes_no_bit_of_a_layers_draw():
    drawn = []
    for pattern in (["q_proj", "up_proj"], r".*layers\.1\..*(q_proj|down_proj)"):
        loaded = base()
        attach(loaded.model, by_pattern(linear_paths(loaded.model), pattern), LoRAConfig(init_lora_weights=False))
        drawn.append(adapter_tensors(partition(loaded.model)[1]))
    shared = set(drawn[0]) & set(drawn[1])
    assert len(shared) == 2
    assert all(np.array_equal(drawn[0][path], drawn[1][path]) for path in shared)


def test_a_linear_cannot_be_adapted_and_trained_whole():
    loaded = base()
    with pytest.raises(ValueError, match="trained whole by modules_to_save"):
        attach(loaded.model, by_pattern(linear_paths(loaded.model), ["q_proj"]), LoRAConfig(modules_to_save=("q_proj",)))


def test_tied_embedding_is_not_trained_alone_before_it_is_untied():
    loaded = base()
    with pytest.raises(ValueError, match="untie"):
        partition(loaded.model, ["embed_tokens"])
    untie(loaded.model)
    assert set(flatten(partition(loaded.model, ["embed_tokens"])[1])) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("case", reference.CASES)
def test_every_tensor_of_a_peft_adapter_is_attached_bit_for_bit(case):
    loaded = base()
    config = attach_from(loaded.model, adapter(case), loaded.spec.rules)
    stored = read_adapter(adapter(case))
    expected = {f"{module}.{part}": array for module, pair in stored.tensors.items() for part, array in pair.items()}
    expected |= {path: array for path, array in stored.modules_to_save.items() if case == "saved"}
    ours = {
        path: np.asarray(jax.tree.leaves(leaf)[0]) for path, leaf in flatten(partition(loaded.model, config.modules_to_save)[1]).items()
    }
    assert set(ours) == set(expected)
    assert all(np.array_equal(ours[path], expected[path]) for path in ours)


@pytest.mark.parametrize("case", reference.CASES)
def test_every_scale_is_the_adapters(case):
    loaded = base()
    attach_from(loaded.model, adapter(case), loaded.spec.rules)
    stored = read_adapter(adapter(case))
    scales = {path: float(leaf) for path, leaf in flatten(partition(loaded.model)[2]).items() if path.endswith("lora_scale")}
    assert scales == {f"{path}.lora_scale": np.float32(stored.config.scale(path)) for path in stored.tensors}


def test_saved_head_of_a_tied_model_is_a_weight_of_its_own():
    loaded = base()
    attach_from(loaded.model, adapter("saved"), loaded.spec.rules)
    assert loaded.model.lm_head.weight is not None


def test_adapted_head_of_a_tied_model_stays_tied():
    loaded = base()
    attach_from(loaded.model, adapter("lm_head"), loaded.spec.rules)
    assert loaded.model.lm_head.weight is None


def test_older_spelling_is_read_with_its_ranks_and_scales(tmp_path):
    """As Qwen2-VL's adapters changed: ``model.layers`` on disk, ``model.text.layers`` … here the other way round."""
    rules = Rules(
        (Spelling("new", same("model", "lm_head")), Spelling("old", (Rename("language.model", "model"), Rename("head", "lm_head"))))
    )
    stored = read_adapter(adapter("patterns"))
    old = {f"language.{path}": pair for path, pair in stored.tensors.items()}
    fields = {**json.loads((adapter("patterns") / "adapter_config.json").read_text())}
    regex = rf"language\.{fields['target_modules']}"
    patterns = {"language.model.layers.0.self_attn.q_proj": 2, "up_proj": 3}
    config = type(stored.config)(**{**vars(stored.config), "target_modules": regex, "rank_pattern": patterns})
    write_adapter(tmp_path, type(stored)(config, old))
    loaded = base()
    read = attach_from(loaded.model, tmp_path, rules)
    assert {path: (read.rank(path), read.scale(path)) for path in stored.tensors} == {
        path: (stored.config.rank(path), stored.config.scale(path)) for path in stored.tensors
    }


def drop_one(tensors):
    return {name: array for name, array in tensors.items() if "layers.1.mlp.up_proj" not in name}


def other_size(tensors):
    return {name: np.repeat(array, 2, 1) if "q_proj.lora_A" in name else array for name, array in tensors.items()}


def other_names(tensors):
    return {name.replace("layers.1.mlp.up_proj", "layers.7.mlp.up_proj"): array for name, array in tensors.items()}


def not_finite(tensors):
    return {name: np.full_like(array, np.nan) if "k_proj.lora_B" in name else array for name, array in tensors.items()}


FAULTS = {
    drop_one: r"layers\.1\.mlp\.up_proj: declared by target_modules",
    other_size: r"(?s)layers\.0\.self_attn\.q_proj: it adapts.*layers\.1\.self_attn\.q_proj: it adapts",
    other_names: r"(?s)layers\.7\.mlp\.up_proj: the model has no such Linear.*layers\.1\.mlp\.up_proj: declared",
    not_finite: "not finite",
}


@pytest.mark.parametrize("change", FAULTS, ids=lambda f: f.__name__)
def test_adapter_that_does_not_fit_is_refused_before_the_model_changes(change, tmp_path):
    loaded = base()
    with pytest.raises(ValueError, match=FAULTS[change]):
        attach_from(loaded.model, rewritten(tmp_path, change), loaded.spec.rules)
    assert not adapter_tensors(nnx.to_pure_dict(nnx.state(loaded.model)))


def test_adapted_embeddings_are_refused_by_name():
    loaded = base()
    with pytest.raises(NotImplementedError, match="embed_tokens"):
        attach_from(loaded.model, reference.TESTS / "golden" / "peft" / "embedding", loaded.spec.rules)


def test_second_adapter_is_refused():
    loaded = base()
    attach_from(loaded.model, adapter(), loaded.spec.rules)
    with pytest.raises(ValueError, match="already"):
        attach_from(loaded.model, adapter(), loaded.spec.rules)
