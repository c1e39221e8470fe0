"""Gemma 3 with images computes what transformers computes; its reference comes from tests/oracle/make_gemma3.py."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlora.adapt import LoRAConfig, attach, partition
from jaxlora.data.patches import patches_of
from jaxlora.export import save_merged
from jaxlora.models import gemma3 as architecture
from jaxlora.models.gemma3 import SPEC
from jaxlora.models.spec import Batch
from jaxlora.nn import attention as attention_module
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import Stack, flatten, flatten_leaves, linear_paths, nest
from jaxlora.select import by_flags, by_pattern, expand, is_stacked, layers_of
from jaxlora.train.remat import execution
from tests.jaxlora import reference
from tests.jaxlora.models.gemma3 import (
    USED,
    VALUES,
    at_tokens,
    expected,
    inputs,
    loaded,
    logits_of,
    micro,
    runner,
    shared_model,
)
from tests.tolerances import LOGITS_FP32, PACKED_FP32, SENSITIVITY


def test_logits_are_those_of_transformers():
    assert np.abs(at_tokens(runner()(micro())) - at_tokens(expected()["logits"])).max() <= LOGITS_FP32


def states_of(model, batch, monkeypatch):
    """The output of every layer of both towers, by path."""
    real, states = Stack.__call__, {}

    def recording(stack, *arguments, collect=(), **options):
        x, collected, outs = real(stack, *arguments, **options, collect=[*range(1, stack.depth + 1), *collect])
        states.update({f"{stack.path}.{i}": state for i, state in enumerate(collected[: stack.depth])})
        return x, collected[stack.depth :], outs

    monkeypatch.setattr(Stack, "__call__", recording)
    model(batch, Execution())
    return states


def test_every_layer_of_both_towers_gives_what_transformers_gives(monkeypatch):
    found = states_of(shared_model(), micro(), monkeypatch)
    assert len(found) == 2 + 4
    for path, ours in found.items():
        theirs = expected()[f"module:{path}"]
        if "vision" in path:
            difference = ours[0, :USED] - in_merge_order(theirs).reshape(USED, -1)
        else:
            difference = at_tokens(ours) - at_tokens(theirs)
        assert np.abs(difference).max() <= LOGITS_FP32, path


def in_merge_order(states):
    """transformers' row-major patches [N, 36, D] in the batch's order."""
    return np.stack([patches_of(image.reshape(6, 6, -1).transpose(2, 0, 1), 1, 2) for image in states])


def test_embeddings_final_norm_and_projector_give_what_transformers_gives():
    model, batch = shared_model().model, micro()
    tower, images = model.vision_tower, 4
    embedded = tower.embeddings(batch.patches, batch.patch_positions)
    states = tower(batch, Execution(), jnp.float32)
    for path, ours in (("embeddings", embedded), ("post_layernorm", states)):
        theirs = in_merge_order(expected()[f"module:model.vision_tower.{path}"]).reshape(USED, -1)
        assert np.abs(ours[0, :USED] - theirs).max() <= LOGITS_FP32, path
    theirs = expected()["module:model.multi_modal_projector"].reshape(images * 9, -1)
    assert np.abs(model.multi_modal_projector(states)[0, : images * 9] - theirs).max() <= LOGITS_FP32


@pytest.mark.parametrize("part", ["self_attn", "mlp"])
def test_every_decoder_attention_and_mlp_gives_what_transformers_gives(part):
    batch, decoder = micro(), shared_model().model.language_model
    segments = batch.segment_starts, batch.segment_lengths
    reach = architecture.image_ends(batch.vision_index)
    shared = decoder.shared(batch.position_ids, segments, jnp.float32, reach=reach)
    features = shared_model().model.multi_modal_projector(shared_model().model.vision_tower(batch, Execution(), jnp.float32))
    x = architecture.fuse(decoder.embed_tokens(batch.input_ids), features, batch.vision_index)
    for i in range(decoder.layers.depth):
        key = next(k for run in decoder.layers.runs for k in run.keys if i in layers_of(k))
        at = layers_of(key).index(i)
        graphdef, state = nnx.split(getattr(decoder.layers, key))
        layer = nnx.merge(graphdef, jax.tree.map(lambda a, at=at: a[at], state))
        attended = layer.self_attn(layer.input_layernorm(x), shared, attention_module.LayerInputs())[0]
        between = x + layer.post_attention_layernorm(attended)
        ours = {"self_attn": attended, "mlp": layer.mlp(layer.pre_feedforward_layernorm(between))}[part]
        difference = at_tokens(ours) - at_tokens(expected()[f"module:model.language_model.layers.{i}.{part}"])
        assert np.abs(difference).max() <= LOGITS_FP32, i
        x, _ = layer(x, shared, attention_module.LayerInputs())


def test_bf16_logits_are_as_near_as_those_of_transformers():
    ours = at_tokens(logits_of(loaded("bfloat16").model, micro()))
    assert np.sqrt(np.mean((ours - at_tokens(expected()["logits"])) ** 2)) <= 1.2 * expected()["bf16_error"]


def test_what_is_in_the_padding_changes_nothing():
    batch = micro()
    noisy = dataclasses.replace(
        batch, patches=batch.patches.at[:, USED:].set(7.0), patch_positions=batch.patch_positions.at[:, USED:].set(3)
    )
    assert np.array_equal(runner()(batch), runner()(noisy))


def test_data_shards_change_nothing():
    one, two = runner()(micro(rows=4)), runner()(micro(rows=4, shards=2))
    assert np.abs(at_tokens(one[:3]) - at_tokens(two[:3])).max() <= LOGITS_FP32


def test_packed_rows_are_the_same_rows_alone():
    ids, mask = inputs()["input_ids"], inputs()["attention_mask"].astype(bool)
    packed = {
        "input_ids": np.concatenate([row[kept] for row, kept in zip(ids, mask, strict=True)])[None],
        "segment_lengths": mask.sum(1)[None],
        "pixel_values": inputs()["pixel_values"],
    }
    ours = runner()(micro(packed, tokens=96, rows=1, segments=3))[0, : mask.sum()]
    assert np.abs(ours - at_tokens(expected()["logits"])).max() <= LOGITS_FP32


def test_remat_changes_nothing():
    again = logits_of(shared_model(), micro(), execution(True))
    assert np.abs(again - logits_of(shared_model(), micro())).max() <= PACKED_FP32


def test_every_parameter_of_every_layer_moves_the_logits():
    leaves = flatten_leaves(nnx.to_pure_dict(nnx.state(shared_model())))
    batch = micro()
    base = at_tokens(runner()(batch))

    def moved(stacked, layer):
        # A norm's weight of 0 is a scale of 1, not nothing.
        change = (lambda a: a.at[layer].set(-1)) if stacked.endswith("norm.weight") else (lambda a: a.at[layer].set(0))
        return np.abs(at_tokens(runner()(batch, nest({**leaves, stacked: jax.tree.map(change, leaves[stacked])}))) - base).max()

    places = [(path, i if is_stacked(path) else ...) for path in leaves for i in range(len(expand(path)))]
    dead = {path for path, layer in places if not moved(path, layer) > SENSITIVITY}
    # Without rotation a bias of the keys adds the same to every logit of a query, which a softmax does not see.
    assert dead == {path for path in leaves if "vision_tower" in path and path.endswith("k_proj.bias")}


@pytest.mark.parametrize("field", ["patch_positions", "position_ids", "patch_segment_lengths", "vision_index"])
def test_every_field_of_the_batch_moves_the_logits(field):
    batch = micro()
    other = {"patch_segment_lengths": lambda a: a.at[:, 0].add(a[:, 1]).at[:, 1].set(0)}.get(field, lambda a: 0 * a)
    assert np.abs(runner()(dataclasses.replace(batch, **{field: other(getattr(batch, field))})) - runner()(batch)).max() > SENSITIVITY


@pytest.mark.parametrize("option", [{"reach": None}, {"window": None}, {"scale": None}])
def test_dropping_what_the_text_attention_does_moves_the_logits(option, monkeypatch):
    real = attention_module.attention
    monkeypatch.setattr(attention_module, "attention", lambda *a, **k: real(*a, **{**k, **option}))
    assert np.abs(at_tokens(logits_of(shared_model(), micro()) - expected_rows())).max() > SENSITIVITY


def expected_rows():
    """transformers' logits with room for the batch's padding."""
    logits = expected()["logits"]
    return np.pad(logits, ((0, 0), (0, micro().input_ids.shape[1] - logits.shape[1]), (0, 0)))


def test_only_text_is_scaled_and_a_text_model_needs_no_image():
    text = {"input_ids": inputs()["input_ids"][1:2, :17]}
    ours = runner()(micro(text, patches=0, rows=1))[0, :17]
    assert np.abs(ours - expected()["logits"][1, :17]).max() <= LOGITS_FP32


def test_generation_continues_a_prompt_with_images_as_one_forward_pass_would():
    model, row = shared_model(), int(inputs()["attention_mask"][0].sum())
    known = row - 4
    caches = model.init_caches(1, row, jnp.float32)
    prompt = micro({"input_ids": inputs()["input_ids"][:1, :known], "pixel_values": inputs()["pixel_values"][:2]}, tokens=known, rows=1)
    hidden, caches = model(prompt, Execution(), caches=caches, column=jnp.array([0]))
    segment = jnp.ones((1, 1), jnp.int32)
    for at in range(known, row):
        ids = jnp.asarray(inputs()["input_ids"][:1, at : at + 1])
        step = Batch(input_ids=ids, labels=ids, position_ids=at * segment, segment_starts=0 * segment, segment_lengths=segment)
        hidden, caches = model(step, Execution(), caches=caches, column=jnp.array([at]))
        assert np.abs(model.head().logits(hidden)[0, 0] - expected()["logits"][0, at]).max() <= LOGITS_FP32, at


def test_every_parameter_and_every_adapter_is_trained_and_images_take_part():
    model = loaded().model
    attach(model, by_flags(linear_paths(model), targets="all-linear"), LoRAConfig(r=2, init_lora_weights=False))
    graphdef, trainable, frozen = partition(model, full=True)

    @jax.jit
    @jax.grad
    def gradient(trainable):
        whole = nest({**flatten_leaves(trainable), **flatten_leaves(frozen)})
        return jnp.mean(jnp.square(logits_of(nnx.merge(graphdef, whole), micro())[:, :34]))

    flat = flatten(gradient(trainable))
    assert sum("lora" in path for path in flat) == 2 * (2 * 6 + 4 * 7)
    assert not [path for path, leaf in flat.items() if not all(map(jnp.any, jax.tree.leaves(leaf)))]


@pytest.mark.parametrize("target", ["fc1", "out_proj", "v_proj"])
def test_dropout_in_either_tower_follows_its_key(target):
    model = loaded().model
    attach(model, by_pattern(linear_paths(model), [target]), LoRAConfig(r=2, lora_dropout=0.5, init_lora_weights=False))
    graphdef, state = nnx.split(model)
    loss = jax.jit(lambda key: jnp.sum(logits_of(nnx.merge(graphdef, state), micro(), Execution(dropout_key=key)) ** 2))
    a, again, b = (loss(jax.random.key(seed)) for seed in (0, 0, 1))
    assert a == again != b


def test_quantising_leaves_the_tower_as_it_is():
    kept, formats = loaded(load_in_4bit=True).kept, loaded(load_in_4bit=True).formats
    assert {path for path in kept if "vision_tower" in path} == {p for p in linear_paths(shared_model()) if "vision_tower" in p}
    assert {path for path, name in formats.items() if name == "Int4"} == {p for p in linear_paths(shared_model()) if "layers" in p} - set(
        kept
    )


@pytest.mark.parametrize("full", [False, True])
def test_a_model_is_written_as_it_was_read(full, tmp_path):
    model = loaded("bfloat16")
    _, trainable, frozen = partition(model.model, full=full)
    save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=model)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (reference.reference_folder("gemma3") / name).read_bytes()


@pytest.mark.parametrize("name", ["config.json", "config_v5.json"])
def test_old_and_new_configs_mean_the_same(name):
    raw = json.loads((reference.reference_folder("gemma3") / name).read_text())
    assert SPEC.read(raw) == SPEC.read(SPEC.tiny)
    assert SPEC.values(raw) == VALUES


def test_the_hubs_sparse_file_of_the_4b_model_is_read():
    vision = {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
    raw = {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
        "vision_config": {**vision, "patch_size": 14, "vision_use_head": False, "model_type": "siglip_vision_model"},
    }
    config, values = SPEC.read(raw), SPEC.values(raw)
    assert (config.merge, config.vision.side, config.tie_word_embeddings) == (4, 64, True)
    assert (values.vocab_size, values.vision.image_token_id, values.vision.grid) == (262208, 262144, (1, 64, 64))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"pixel_values have shape \(4, 3, 28, 24\), expected \[images, channels, 24, 24\]"):
        micro({**inputs(), "pixel_values": np.zeros((4, 3, 28, 24))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_qk_norm": True}, "use_qk_norm = True is unknown"),
        ({"mm_tokens_per_image": 8}, "mm_tokens_per_image=8 must be a square that divides the 6 x 6 patches"),
        ({"mm_tokens_per_image": 16}, "mm_tokens_per_image=16 must be a square that divides"),
        ({"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping = 30.0 is not implemented"),
        ({"text_config": {"use_bidirectional_attention": True}}, "use_bidirectional_attention = True is not implemented"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act = 'gelu' is not implemented"),
        ({"vision_config": {"num_attention_heads": 5}}, "hidden_size=36 must be a multiple of num_attention_heads=5"),
        ({"vision_config": {"image_size": 26}}, "image_size=26 must be a multiple of patch_size=4"),
    ],
)
def test_what_is_not_modelled_is_refused(change, message):
    nested = {key: {**SPEC.tiny[key], **value} if isinstance(value, dict) else value for key, value in change.items()}
    with pytest.raises(ValueError) as caught:
        SPEC.read({**SPEC.tiny, **nested})
    assert message in str(caught.value)
