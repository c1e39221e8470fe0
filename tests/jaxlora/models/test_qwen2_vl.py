"""Qwen2-VL computes what transformers computes; its golden files come from tests/oracle/make_qwen2_vl.py."""

import dataclasses
import json
import pathlib

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conversion.safetensors_io import open_checkpoint
from jaxlora.adapt import LoRAConfig, attach, fill_adapters, partition
from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.load import LoadConfig, load
from jaxlora.models.qwen2_vl import SPEC
from jaxlora.models.spec import Batch
from jaxlora.nn import rope
from jaxlora.nn.attention import LayerInputs, Shared
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import flatten, flatten_leaves, linear_paths, nest
from jaxlora.select import by_flags, by_pattern, expand, is_stacked
from jaxlora.weights.dense import Dense
from tests.tolerances import LOGITS_FP32, PACKED_FP32, SENSITIVITY

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "qwen2_vl"
EXPECTED = dict(np.load(GOLDEN / "expected.npz"))
INPUTS = {k: v for k, v in EXPECTED.items() if k != "bf16_error" and k != "position_ids" and k != "logits" and not k.startswith("module:")}
TOKENS, PATCHES, FRAMES = 32, 120, 6  # 25, 104 and 5 are used
KEPT = EXPECTED["attention_mask"].astype(bool)
VALUES = SPEC.values(SPEC.tiny)
HF5 = dataclasses.replace(VALUES, vision=dataclasses.replace(VALUES.vision, mrope_advance="hf5"))


def micro(inputs=INPUTS, values=HF5, tokens=TOKENS, patches=PATCHES, rows=3, shards=1) -> Batch:
    batch = make_batch([inputs], values, Shape(tokens, patches), rows=rows, images=FRAMES, shards=shards)
    return jax.tree.map(lambda a: jnp.asarray(a[0]), batch)


def text_only():
    return micro({"input_ids": INPUTS["input_ids"][1:2, :9]}, patches=0, rows=1)


def loaded(dtype=jnp.float32):
    return load(GOLDEN, LoadConfig(dtype=dtype)).model


def logits_of(model, batch, execution=Execution()):  # noqa: B008
    return model.head().logits(model(batch, execution)[0])


def features_of(model, batch):
    frames = (batch.patch_segment_starts, batch.patch_segment_lengths)
    return model.model.visual(batch.patches, batch.patch_positions, frames, Execution())


@pytest.fixture(scope="module")
def model():
    return loaded()


@pytest.fixture(scope="module")
def run(model):
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda tree, batch: logits_of(nnx.merge(graphdef, tree), batch))
    return lambda batch, tree=None: np.asarray(compiled(nnx.to_pure_dict(state) if tree is None else tree, batch))


def test_logits_are_those_of_transformers(run):
    ours = run(micro())[:, : KEPT.shape[1]]
    assert np.abs(ours - EXPECTED["logits"])[KEPT].max() <= LOGITS_FP32


def test_every_block_and_the_merger_give_what_transformers_gives(model):
    batch, tower = micro(), model.model.visual
    inverse = rope.frequencies(tower.config.head_dim // 2, rope.Rope(theta=1e4))
    frames = (batch.patch_segment_starts, batch.patch_segment_lengths)
    shared = Shared(rope.axial_table(batch.patch_positions, inverse, jnp.float32), frames)
    _, states, _ = tower.blocks(tower.patch_embed(batch.patches), shared, LayerInputs(), collect=(1, 2))
    found = {f"model.visual.blocks.{i}": state[0] for i, state in enumerate(states)} | {"model.visual.merger": features_of(model, batch)[0]}
    for name, ours in found.items():
        expected = EXPECTED[f"module:{name}"]
        assert np.abs(ours[: len(expected)] - expected).max() <= LOGITS_FP32, name


def test_every_decoder_layer_gives_what_transformers_gives(model):
    batch, decoder = micro(), model.model.language_model
    tokens = decoder.embed_tokens(batch.input_ids)
    index = np.asarray(batch.vision_index)
    x = np.where(index[..., None] >= 0, features_of(model, batch)[0][index], tokens)
    shared = Shared(decoder.rope_table(batch.position_ids, jnp.float32), (batch.segment_starts, batch.segment_lengths))
    _, states, _ = decoder.layers(jnp.asarray(x), shared, LayerInputs(), collect=(1, 2, 3))
    for i, ours in enumerate(states):
        assert np.abs(ours[:, : KEPT.shape[1]] - EXPECTED[f"module:model.language_model.layers.{i}"])[KEPT].max() <= LOGITS_FP32, i


def test_positions_are_those_of_transformers_with_its_rule_for_videos():
    ours = np.asarray(micro().position_ids)[:, :, : KEPT.shape[1]]
    assert np.array_equal(ours[:, KEPT], EXPECTED["position_ids"][:, KEPT])


def test_the_reference_rule_for_videos_is_the_default_and_differs(run):
    ours, reference = run(micro()), run(micro(values=VALUES))
    assert np.array_equal(ours[:2], reference[:2])
    assert np.abs(ours[2] - reference[2]).max() > SENSITIVITY


def test_bf16_logits_are_as_near_as_those_of_transformers():
    ours = np.asarray(logits_of(loaded(jnp.bfloat16), micro()))[:, : KEPT.shape[1]]
    error = np.sqrt(np.mean((ours - EXPECTED["logits"])[KEPT] ** 2))
    assert error <= 1.2 * EXPECTED["bf16_error"]


def test_an_image_is_the_same_beside_others_and_beside_padding(model):
    grid = tuple(INPUTS["image_grid_thw"][1])
    start = int(INPUTS["image_grid_thw"][0].prod())
    second = INPUTS["pixel_values"][start:]
    ids = np.full((1, len(second) // 4), VALUES.vision.image_token_id)
    alone = micro({"input_ids": ids, "pixel_values": second, "image_grid_thw": np.array([grid])}, patches=len(second), rows=1)
    together = features_of(model, micro())[0, start // 4 : (start + len(second)) // 4]
    assert np.abs(features_of(model, alone)[0] - together).max() <= PACKED_FP32


def test_what_is_in_the_padding_changes_nothing(run):
    batch = micro()
    noisy = dataclasses.replace(batch, patches=batch.patches.at[:, 104:].set(7.0), patch_positions=batch.patch_positions.at[:, 104:].set(3))
    assert np.array_equal(run(batch), run(noisy))


def test_padding_patches_take_no_gradient_and_others_do(model):
    batch = micro()

    @jax.jit
    @jax.grad
    def gradient(patches):
        return jnp.square(logits_of(model, dataclasses.replace(batch, patches=patches))).sum()

    norms = jnp.linalg.norm(gradient(batch.patches)[0], axis=-1)
    assert (norms[:104] > 0).all() and (norms[104:] == 0).all()


def test_data_shards_change_nothing(run):
    one, two = run(micro(rows=4)), run(micro(rows=4, shards=2))
    assert np.abs(one - two)[:3, : KEPT.shape[1]][KEPT].max() <= LOGITS_FP32


def test_remat_changes_nothing(model):
    batch = micro()
    again = logits_of(model, batch, Execution(checkpoint=True, remat=jax.checkpoint_policies.nothing_saveable))
    assert np.abs(again - logits_of(model, batch)).max() <= PACKED_FP32


def test_patches_that_are_no_multiple_of_a_feature_are_refused(model):
    with pytest.raises(ValueError, match="118 patches a shard, which is no multiple of the 4"):
        features_of(model, micro(patches=118))


def scans_of_tower(function, *arguments):
    """How many scans of a jaxpr carry the tower's state, [P, W, 40]."""

    def carries(equation):
        shapes = [getattr(v.aval, "shape", ()) for v in equation.outvars]
        return equation.primitive.name == "scan" and any(len(shape) == 3 and shape[-1] == 40 for shape in shapes)

    def count(jaxpr):
        inner = [inner for equation in jaxpr.eqns for inner in jax.extend.core.jaxprs_in_params(equation.params)]
        return sum(map(carries, jaxpr.eqns)) + sum(map(count, inner))

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_the_tower_runs_only_where_there_are_patches(model):
    runs = [scans_of_tower(lambda batch: logits_of(model, batch), batch) for batch in (micro(), text_only())]
    assert runs == [1, 0]


def adapted(select, dropout=0.0, full=False):
    """A model with random A and B, split for a step."""
    model = loaded()
    attach(model, select(linear_paths(model)), LoRAConfig(r=4, lora_dropout=dropout))
    random = np.random.default_rng(0)
    shapes = {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items() if "lora" in path}
    fill_adapters(model, lambda path, leaf: random.normal(0, 0.2, shapes[f"{path}.{leaf}"]))
    return partition(model, full=full)


def square_loss(graphdef, frozen, batch, execution=Execution()):  # noqa: B008
    def loss(trainable):
        whole = nest({**flatten_leaves(trainable), **flatten_leaves(frozen)})
        return jnp.mean(jnp.square(logits_of(nnx.merge(graphdef, whole), batch, execution)[:, : KEPT.shape[1]]))

    return loss


@pytest.mark.parametrize(("vision", "scans"), [(False, 1), (True, 2)])
def test_a_frozen_tower_has_no_backward(vision, scans):
    graphdef, trainable, frozen = adapted(lambda paths: by_flags(paths, vision=vision))
    assert scans_of_tower(jax.grad(square_loss(graphdef, frozen, micro())), trainable) == scans


def test_every_parameter_and_every_adapter_is_trained():
    graphdef, trainable, frozen = adapted(lambda paths: by_flags(paths, targets="all-linear"), full=True)
    gradient = flatten(jax.jit(jax.grad(square_loss(graphdef, frozen, micro())))(trainable))
    assert sum("lora" in path for path in gradient) == 2 * (2 * 4 + 3 * 7 + 2)
    assert not [path for path, leaf in gradient.items() if not all(map(jnp.any, jax.tree.leaves(leaf)))]


@pytest.mark.parametrize("target", ["qkv", "merger.mlp.0", "k_proj", "down_proj"])
def test_dropout_of_one_kind_of_linear_alone_follows_its_key(target):
    graphdef, trainable, frozen = adapted(lambda paths: by_pattern(paths, [target]), dropout=0.5)
    loss = jax.jit(lambda key: square_loss(graphdef, frozen, micro(), Execution(dropout_key=key))(trainable))
    a, again, b = (loss(jax.random.key(seed)) for seed in (0, 0, 1))
    assert a == again != b


@pytest.mark.parametrize(
    ("flags", "vision", "language"),
    [
        ({}, ("qkv", "proj", "fc1", "fc2"), ("attention", "mlp")),
        ({"vision": False}, (), ("attention", "mlp")),
        ({"language": False}, ("qkv", "proj", "fc1", "fc2"), ()),
        ({"mlp": False}, ("qkv", "proj"), ("attention",)),
        ({"attention": False}, ("fc1", "fc2"), ("mlp",)),
        ({"vision": False, "mlp": False}, (), ("attention",)),
    ],
)
def test_flags_select_the_linears_that_unsloth_selects(model, flags, vision, language):
    inside = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    kinds = {"attention": [f"self_attn.{n}_proj" for n in "qkvo"], "mlp": [f"mlp.{n}_proj" for n in ("gate", "up", "down")]}
    expected = {f"model.visual.blocks.{i}.{inside[name]}" for i in range(2) for name in vision}
    expected |= {f"model.language_model.layers.{i}.{name}" for i in range(3) for kind in language for name in kinds[kind]}
    assert set(by_flags(linear_paths(model), **flags).paths) == expected


def test_generation_continues_the_prompt_as_one_forward_pass_would(run, model):
    row = int(KEPT[0].sum())
    ids = jnp.asarray(INPUTS["input_ids"][:1, :row])
    pictures = {name: INPUTS[name] for name in ("pixel_values", "image_grid_thw")}
    caches = model.init_caches(1, TOKENS, jnp.float32)
    prompt = micro({"input_ids": np.asarray(ids[:, :-1]), **pictures}, rows=1)
    _, caches = model(prompt, Execution(), caches=caches, column=jnp.array([0]))
    last = jnp.asarray(EXPECTED["position_ids"][:, :1, row - 1 : row])
    segment = jnp.ones((1, 1), jnp.int32)
    step = Batch(input_ids=ids[:, -1:], labels=ids[:, -1:], position_ids=last, segment_starts=0 * segment, segment_lengths=segment)
    hidden, _ = model(step, Execution(), caches=caches, column=jnp.array([row - 1]))
    assert np.abs(model.head().logits(hidden)[0, 0] - EXPECTED["logits"][0, row - 1]).max() <= LOGITS_FP32


def test_every_parameter_of_every_layer_moves_the_logits(run, model):
    leaves = flatten_leaves(nnx.to_pure_dict(nnx.state(model)))
    batch = micro()
    base = run(batch)[:, : KEPT.shape[1]][KEPT]

    def moved(stacked, layer):
        without = jax.tree.map(lambda a: a.at[layer].set(0), leaves[stacked])
        return np.abs(run(batch, nest({**leaves, stacked: without}))[:, : KEPT.shape[1]][KEPT] - base).max()

    places = [(path, i if is_stacked(path) else ...) for path in leaves for i in range(len(expand(path)))]
    assert not [(path, layer) for path, layer in places if not moved(path, layer) > SENSITIVITY]


@pytest.mark.parametrize("field", ["patch_positions", "position_ids", "patch_segment_lengths", "vision_index"])
def test_every_field_of_the_batch_moves_the_logits(run, field):
    batch = micro()
    other = {"patch_segment_lengths": lambda a: a.at[:, 0].add(a[:, 1]).at[:, 1].set(0)}.get(field, lambda a: 0 * a)
    assert np.abs(run(dataclasses.replace(batch, **{field: other(getattr(batch, field))})) - run(batch)).max() > SENSITIVITY


def test_the_model_holds_the_file_bit_for_bit_under_its_names():
    checkpoint = open_checkpoint(GOLDEN)
    held = flatten(nnx.to_pure_dict(nnx.state(loaded(jnp.bfloat16))))
    arrays = {path: leaf.array if isinstance(leaf, Dense) else leaf for path, leaf in held.items()}
    hub = SPEC.rules.spellings[0]
    assert sorted(hub.to_disk(path) for path in arrays) == sorted(checkpoint.names())
    for path, array in arrays.items():
        assert np.asarray(array).tobytes() == np.asarray(checkpoint.read(hub.to_disk(path))).tobytes(), path


def test_an_untied_head_is_a_weight_of_its_own():
    built = SPEC.build(SPEC.read({**SPEC.tiny, "tie_word_embeddings": False}))
    assert flatten_leaves(nnx.to_pure_dict(nnx.state(built)))["lm_head.weight"].shape == (331, 72)


@pytest.mark.parametrize("name", ["config.json", "config_v5.json"])
def test_flat_and_nested_configs_mean_the_same(name):
    raw = json.loads((GOLDEN / name).read_text())
    assert SPEC.read(raw) == SPEC.read(SPEC.tiny)
    assert SPEC.values(raw) == VALUES


def test_a_tie_flag_inside_the_text_config_ties():
    raw = json.loads((GOLDEN / "config_v5.json").read_text())
    raw["text_config"]["tie_word_embeddings"] = raw.pop("tie_word_embeddings")
    assert SPEC.read(raw).tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_qk_norm": True}, "use_qk_norm = True is unknown"),
        ({"head_dim": 16}, "head_dim = 16 is not implemented"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 3]}}, "has 7 frequencies, expected 6"),
        ({"vision": {"hidden_act": "gelu"}}, "hidden_act = 'gelu' is not implemented"),
        ({"vision": {"window_size": 112}}, "window_size = 112 is unknown"),
        ({"vision": {"in_chans": 1}}, "in_chans = 1 is not implemented"),
        ({"vision": {"hidden_size": 40}}, "(the tower's output) is 40, the text model's 72"),
        ({"vision": {"num_heads": 4}}, "head size 10 must be a multiple of 4"),
        ({"vision": {"num_heads": 3}}, "embed_dim=40 must be a multiple of num_heads=3"),
    ],
)
def test_what_is_not_modelled_is_refused(change, message):
    vision = {**SPEC.tiny["vision_config"], **change.pop("vision", {})}
    with pytest.raises(ValueError) as caught:
        SPEC.read({**SPEC.tiny, **change, "vision_config": vision})
    assert message in str(caught.value)
