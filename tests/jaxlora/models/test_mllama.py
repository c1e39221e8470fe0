"""Llama 3.2 Vision computes what transformers computes, and by the rules of training; tests/oracle/make_mllama.py made the reference."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlora.adapt import LoRAConfig, attach, partition
from jaxlora.export import save_merged
from jaxlora.models.mllama import SPEC
from jaxlora.models.spec import Batch
from jaxlora.nn import attention as attention_module
from jaxlora.nn import cross as cross_module
from jaxlora.nn import tiles as tiles_module
from jaxlora.nn.attention import LayerInputs, Vision
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import Stack, flatten, flatten_leaves, linear_paths, nest
from jaxlora.select import by_flags, by_pattern, expand, is_stacked, layers_of
from jaxlora.train.remat import execution
from tests.jaxlora import reference
from tests.jaxlora.models.mllama import HF5_VALUES, VALUES, at_tokens, expected, inputs, loaded, logits_of, micro, runner, shared_model
from tests.tolerances import LOGITS_FP32, PACKED_FP32, SENSITIVITY


def test_logits_are_those_of_transformers_with_its_rules():
    assert np.abs(at_tokens(runner()(micro())) - at_tokens(expected()["logits"])).max() <= LOGITS_FP32


def test_logits_are_those_of_training_by_default():
    ours, theirs = runner("reference")(micro(values=VALUES)), expected()["logits_reference"]
    assert np.abs(at_tokens(ours) - at_tokens(theirs)).max() <= LOGITS_FP32
    assert np.abs(at_tokens(theirs) - at_tokens(expected()["logits"])).max() > SENSITIVITY
    assert SPEC.read(SPEC.tiny).vision.compat == VALUES.vision.unseen == "reference"


def test_by_default_a_row_without_an_image_is_what_it_is_alone():
    alone = runner("reference")(micro({"input_ids": inputs()["input_ids"][1:2, :17]}, values=VALUES, patches=0, rows=1))
    together = runner("reference")(micro(values=VALUES))
    assert np.abs(alone[0, :17] - together[1, :17]).max() <= LOGITS_FP32


def states_of(model, batch, monkeypatch):
    """The output of every layer of the three stacks, by path."""
    real, states = Stack.__call__, {}

    def recording(stack, *arguments, collect=(), **options):
        x, collected, outs = real(stack, *arguments, **options, collect=(*range(1, stack.depth + 1), *collect))
        states.update({f"{stack.path}.{i}": state for i, state in enumerate(collected[: stack.depth])})
        return x, collected[stack.depth :], outs

    monkeypatch.setattr(Stack, "__call__", recording)
    model(batch, Execution())
    return states


def test_every_layer_of_both_towers_gives_what_transformers_gives(monkeypatch):
    found = states_of(shared_model(), micro(), monkeypatch)
    assert len(found) == 4 + 2 + 7
    for path, ours in found.items():
        theirs = expected()[f"module:{path}"]
        difference = in_transformers_order(ours) - theirs if "vision" in path else at_tokens(ours) - at_tokens(theirs)
        assert np.abs(difference).max() <= LOGITS_FP32, path


def in_transformers_order(states):
    """The tokens of each tile with its own padding, not all padding at the end."""
    tokens, padding = states[:, : 4 * 17].reshape(6, 4, 17, -1), states[:, 4 * 17 :].reshape(6, 4, 7, -1)
    return np.concatenate([tokens, padding], axis=2).reshape(6, 4 * 24, -1)


def test_features_and_projected_states_are_those_of_transformers():
    model, batch = shared_model().model, micro()
    features = model.vision_model(batch, Execution(), jnp.float32)
    theirs = expected()["module:model.vision_model"]
    assert np.abs(features.reshape(theirs.shape) - theirs).max() <= LOGITS_FP32
    projected = expected()["module:model.multi_modal_projector"].reshape(24, 17, -1)
    states = model.vision_states(batch, Execution(), jnp.float32).reshape(24, 17, -1)
    assert np.abs(states - projected[batch.tile_order[0]]).max() <= LOGITS_FP32


def test_a_rows_tiles_come_first_and_each_token_sees_an_interval_of_them():
    batch, n = micro(), 17
    # 2 and 4 tiles; nothing; 1 and 3 tiles. Two places a row, of 4 tiles.
    assert batch.tile_order[0].tolist() == [0, 1, 4, 5, 6, 7, 2, 3, *range(8, 16), 16, 20, 21, 22, 17, 18, 19, 23]
    seen = [list(zip(s[:14].tolist(), c[:14].tolist(), strict=True)) for s, c in zip(batch.seen_starts, batch.seen_lengths, strict=True)]
    assert seen[0] == [(0, -8 * n)] * 3 + [(0, 2 * n)] * 5 + [(2 * n, 4 * n)] * 6
    assert seen[1] == [(8 * n, -8 * n)] * 14
    assert seen[2] == [(16 * n, -8 * n)] * 2 + [(16 * n, n)] + [(16 * n, 4 * n)] * 11
    default = micro(values=VALUES)
    assert default.aspect_ratio_ids[0].tolist() == [2, 4, 1, 7, 0, 0]
    assert default.seen_lengths[0, :9].tolist() == [0] * 3 + [2 * n] * 5 + [4 * n] and not default.seen_lengths[1].any()


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_every_decoder_attention_and_mlp_gives_what_transformers_gives(part):
    model, batch = shared_model().model, micro()
    decoder = model.language_model
    states = model.vision_states(batch, Execution(), jnp.float32)
    shared = decoder.shared(batch.position_ids, (batch.segment_starts, batch.segment_lengths), jnp.float32)
    vision = Vision(states, batch.seen_starts, batch.seen_lengths)
    shared, x, none = dataclasses.replace(shared, vision=vision), decoder.embed_tokens(batch.input_ids), LayerInputs()
    for i in range(decoder.layers.depth):
        key = next(k for k in decoder.layers.keys if i in layers_of(k))
        at = layers_of(key).index(i)
        graphdef, state = nnx.split(getattr(decoder.layers, key))
        layer = nnx.merge(graphdef, jax.tree.map(lambda a, at=at: a[at], state))
        normed = layer.input_layernorm(x)
        if isinstance(layer, cross_module.CrossLayer):
            name, (attended, _) = "cross_attn", layer.cross_attn(normed, vision, none, "auto")
            between = x + tiles_module.gate(layer.cross_attn_attn_gate, jnp.float32) * attended
        else:
            name, (attended, _) = "self_attn", layer.self_attn(normed, shared, none)
            between = x + attended
        ours = attended if part == "attention" else layer.mlp(layer.post_attention_layernorm(between))
        theirs = expected()[f"module:model.language_model.layers.{i}.{name if part == 'attention' else part}"]
        assert np.abs(at_tokens(ours) - at_tokens(theirs)).max() <= LOGITS_FP32, i
        x, _ = layer(x, shared, none)


def test_bf16_logits_are_as_near_as_those_of_transformers():
    ours = at_tokens(logits_of(loaded("bfloat16").model, micro()))
    assert np.sqrt(np.mean((ours - at_tokens(expected()["logits"])) ** 2)) <= 1.2 * expected()["bf16_error"]


def test_what_is_in_the_padding_changes_nothing():
    batch = micro()
    noisy = dataclasses.replace(batch, patches=batch.patches.at[:, 384:].set(7.0))
    assert np.array_equal(runner()(batch), runner()(noisy))


def test_data_shards_change_nothing():
    one, two = runner()(micro(rows=4)), runner()(micro(rows=4, shards=2))
    assert np.abs(at_tokens(one[:3]) - at_tokens(two[:3])).max() <= LOGITS_FP32


def test_packed_rows_are_the_same_rows_alone():
    ids, mask = inputs()["input_ids"], inputs()["attention_mask"].astype(bool)
    packed = {
        "input_ids": np.concatenate([row[kept] for row, kept in zip(ids, mask, strict=True)])[None],
        "segment_lengths": mask.sum(1)[None],
        "pixel_values": inputs()["pixel_values"][[0, 0, 2, 2], [0, 1, 0, 1]][None],
        "aspect_ratio_ids": np.array([[2, 4, 1, 7]]),
    }
    ours = runner("reference")(micro(packed, values=VALUES, tokens=64, rows=1, segments=3))[0, : mask.sum()]
    assert np.abs(ours - at_tokens(expected()["logits_reference"])).max() <= LOGITS_FP32


def test_remat_changes_nothing():
    again = logits_of(shared_model(), micro(), execution(True))
    assert np.abs(again - logits_of(shared_model(), micro())).max() <= PACKED_FP32


def test_every_parameter_of_every_layer_moves_the_logits():
    leaves = flatten_leaves(nnx.to_pure_dict(nnx.state(shared_model())))
    batch = micro()
    base = at_tokens(runner()(batch))

    def moved(stacked, layer):
        changed = jax.tree.map(lambda a: a.at[layer].set(0), leaves[stacked])
        return np.abs(at_tokens(runner()(batch, nest({**leaves, stacked: changed}))) - base).max()

    places = [(path, i if is_stacked(path) else ...) for path in leaves for i in range(len(expand(path)))]
    assert sum("gate" in path.rpartition(".")[2] for path, _ in places) == 3 + 2 * 2 + 2 * 2
    assert not [path for path, layer in places if not moved(path, layer) > SENSITIVITY]


@pytest.mark.parametrize("field", ["aspect_ratio_ids", "position_ids", "tile_order", "seen_starts", "seen_lengths"])
def test_every_field_of_the_batch_moves_the_logits(field):
    batch = micro()
    other = {"tile_order": lambda a: a[:, ::-1], "seen_lengths": abs}.get(field, lambda a: 0 * a)
    assert np.abs(runner()(dataclasses.replace(batch, **{field: other(getattr(batch, field))})) - runner()(batch)).max() > SENSITIVITY


def _everything(seen, keys):
    return tiles_module.Intervals(0 * seen.starts, 0 * seen.ends + keys)


@pytest.mark.parametrize(
    ("module", "change"),
    [
        (attention_module, {"causal": False}),
        (attention_module, {"scale": 1.0}),
        (cross_module, {"scale": 1.0}),
        (cross_module, {"segments": _everything}),
        (tiles_module, {"scale": 1.0}),
        (tiles_module, {"segments": _everything}),
    ],
)
def test_dropping_what_an_attention_does_moves_the_logits(module, change, monkeypatch):
    real = module.attention

    def changed(q, k, v, **options):
        made = {name: value(options[name], k.shape[1]) if callable(value) else value for name, value in change.items()}
        return real(q, k, v, **{**options, **made})

    monkeypatch.setattr(module, "attention", changed)
    ours = at_tokens(logits_of(shared_model(), micro()))
    assert np.abs(ours - at_tokens(expected()["logits"])).max() > SENSITIVITY


def test_generation_continues_a_prompt_with_images_as_one_forward_pass_would():
    model, row = shared_model(), int(inputs()["attention_mask"][0].sum())
    known = row - 4
    caches = model.init_caches(1, row, jnp.float32)
    given = {name: inputs()[name][:1] for name in ("input_ids", "pixel_values", "aspect_ratio_ids")}
    prompt = micro({**given, "input_ids": given["input_ids"][:, :known]}, tokens=known, rows=1)
    hidden, caches = model(prompt, Execution(), caches=caches, column=jnp.array([0]))
    segment = jnp.ones((1, 1), jnp.int32)
    seen = {"seen_starts": prompt.seen_starts[:, -1:], "seen_lengths": prompt.seen_lengths[:, -1:]}
    for at in range(known, row):
        ids = jnp.asarray(given["input_ids"][:, at : at + 1])
        step = Batch(input_ids=ids, labels=ids, position_ids=at * segment, segment_starts=0 * segment, segment_lengths=segment, **seen)
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
        return jnp.mean(jnp.square(logits_of(nnx.merge(graphdef, whole), micro())[:, :18]))

    flat = flatten(gradient(trainable))
    assert sum("lora" in path for path in flat) == 2 * (6 * 6 + 7 * 7 + 1)
    assert not [path for path, leaf in flat.items() if not all(map(jnp.any, jax.tree.leaves(leaf)))]


@pytest.mark.parametrize("target", ["fc1", "o_proj", "cross_attn.v_proj", "cross_attn.q_proj", "multi_modal_projector"])
def test_dropout_everywhere_follows_its_key(target):
    model = loaded().model
    attach(model, by_pattern(linear_paths(model), [target]), LoRAConfig(r=2, lora_dropout=0.5, init_lora_weights=False))
    graphdef, state = nnx.split(model)
    loss = jax.jit(lambda key: jnp.sum(logits_of(nnx.merge(graphdef, state), micro(), Execution(dropout_key=key)) ** 2))
    a, again, b = (loss(jax.random.key(seed)) for seed in (0, 0, 1))
    assert a == again != b


def test_quantising_leaves_projector_and_head_as_they_are():
    made = loaded(load_in_4bit=True)
    assert set(made.kept) == {"model.multi_modal_projector", "lm_head"}
    assert {path for path, name in made.formats.items() if name == "Int4"} == set(linear_paths(shared_model())) - set(made.kept)


@pytest.mark.parametrize("full", [False, True])
def test_a_model_is_written_as_it_was_read(full, tmp_path):
    model = loaded("bfloat16")
    _, trainable, frozen = partition(model.model, full=full)
    save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=model)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (reference.reference_folder("mllama") / name).read_bytes()


@pytest.mark.parametrize("name", ["config.json", "config_v5.json"])
def test_old_and_new_configs_mean_the_same(name):
    raw = json.loads((reference.reference_folder("mllama") / name).read_text())
    assert SPEC.read(raw) == SPEC.read(SPEC.tiny)
    assert SPEC.values(raw) == VALUES


def test_an_empty_file_is_the_11b_model():
    config = SPEC.read({"model_type": "mllama", "text_config": {}, "vision_config": {}})
    assert (config.text.num_hidden_layers, config.text.head_dim, config.head_size, config.text.vocab_size) == (40, 128, 128256, 128264)
    assert config.cross_attention_layers == (3, 8, 13, 18, 23, 28, 33, 38) and config.text.rope.theta == 5e5
    assert (config.vision.features, config.vision.patches, config.vision.padding) == (7680, 1024, 7)
    values = SPEC.values({"model_type": "mllama", "text_config": {}, "vision_config": {"image_size": 560}})
    assert (values.pad_token_id, values.vision.grid, values.vision.tiles) == (128004, (4, 40, 40), (1, 1, 2, 3, 4, 2, 4, 3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_tiles": True}, "use_tiles = True is unknown"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True is not implemented"),
        ({"text_config": {"head_dim": 12}}, "head_dim = 12 is unknown"),
        ({"text_config": {"dropout": 0.1}}, "dropout = 0.1 is not implemented"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "hidden_act = 'quick_gelu' is not implemented"),
        ({"vision_config": {"vision_output_dim": 72}}, "vision_output_dim=72, but the states that are collected have 108 channels"),
        ({"vision_config": {"intermediate_layers_indices": [1, 4]}}, "layer 4 is to be collected, of 4"),
        ({"vision_config": {"attention_heads": 5}}, "hidden_size=36 must be a multiple of attention_heads=5"),
        ({"vision_config": {"max_num_tiles": 3}}, "aspect ratio (1, 4) has more than 3 tiles"),
    ],
)
def test_what_is_not_modelled_is_refused(change, message):
    nested = {key: {**SPEC.tiny[key], **value} if isinstance(value, dict) else value for key, value in change.items()}
    with pytest.raises(ValueError) as caught:
        SPEC.read({**SPEC.tiny, **nested})
    assert message in str(caught.value)


def other_mask():
    mask = inputs()["cross_attention_mask"].copy()
    mask[0, 5, 0, 1] = 0
    return mask


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pixel_values": np.zeros((3, 2, 4, 3, 20, 16))},
            r"pixel_values \(3, 2, 4, 3, 20, 16\).*expected \[rows, images, 4, channels, 16, 16\]",
        ),
        ({"aspect_ratio_ids": np.array([[2, 0], [0, 0], [1, 7]]), "aspect_ratio_mask": None}, "row 0: 2 placeholders, 1 images"),
        ({"aspect_ratio_ids": np.array([[2, 9], [0, 0], [1, 7]])}, "the model knows 0 .no image. to 8"),
        ({"aspect_ratio_ids": np.array([[2, 7], [0, 0], [1, 7]])}, "aspect_ratio_mask .* does not fit"),
        ({"cross_attention_mask": other_mask}, "row 0: cross_attention_mask is not that of the processor"),
        ({"labels": lambda: inputs()["input_ids"]}, "labels hold token 331, but the model's vocabulary has 331"),
    ],
)
def test_inputs_that_contradict_each_other_are_refused(change, message):
    given = {name: value() if callable(value) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        micro({**inputs(), **given}, values=HF5_VALUES)
