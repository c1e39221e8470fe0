"""LLaVA with each of its towers and Mistral 3 compute what transformers computes; the references come from tests/oracle/make_llava.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlora.adapt import LoRAConfig, attach, partition
from jaxlora.export import save_merged
from jaxlora.models.spec import Batch
from jaxlora.nn import pixtral as pixtral_module
from jaxlora.nn.attention import LayerInputs
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import Stack, flatten, flatten_leaves, linear_paths, nest
from jaxlora.nn.vision import fuse
from jaxlora.select import by_flags, by_pattern, expand, is_stacked, layers_of
from jaxlora.train.remat import execution
from tests.jaxlora import reference
from tests.jaxlora.models.llava import (
    CONFIGS,
    NAMES,
    OF_ANY_SIZE,
    USED,
    at_tokens,
    by_patch,
    expected,
    inputs,
    loaded,
    logits_of,
    micro,
    runner,
    shared_model,
)
from tests.tolerances import LOGITS_FP32, PACKED_FP32, SENSITIVITY

every_tower = pytest.mark.parametrize("name", NAMES)
# SigLIP's differs from CLIP's where patches become states, and Pixtral's is Mistral 3's as well.
two_towers = pytest.mark.parametrize("name", ["llava", "mistral3"])
but_siglip = pytest.mark.parametrize("name", [name for name in NAMES if name != "llava_siglip"])


@every_tower
def test_logits_are_those_of_transformers(name):
    assert np.abs(at_tokens(name, runner(name)(micro(name))) - at_tokens(name, expected(name)["logits"])).max() <= LOGITS_FP32


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


@every_tower
def test_every_layer_of_both_towers_gives_what_transformers_gives(name, monkeypatch):
    found = states_of(shared_model(name), micro(name), monkeypatch)
    assert len(found) == sum(config["num_hidden_layers"] for config in (CONFIGS[name]["text_config"], CONFIGS[name]["vision_config"]))
    for path, state in found.items():
        theirs = expected(name)[f"module:{path}"]
        pair = by_patch(name, state, theirs) if "vision" in path else [at_tokens(name, array) for array in (state, theirs)]
        assert np.abs(pair[0] - pair[1]).max() <= LOGITS_FP32, path


def test_norm_and_patch_merger_of_mistral3_give_what_transformers_gives():
    projector, batch = shared_model("mistral3").model.multi_modal_projector, micro("mistral3")
    normed = projector.norm(shared_model("mistral3").model.vision_tower(batch, Execution(), jnp.float32))
    for part, state in (("norm", normed), ("patch_merger", projector.patch_merger(normed, None))):
        ours, theirs = by_patch("mistral3", state, expected("mistral3")[f"module:model.multi_modal_projector.{part}"])
        assert np.abs(ours - theirs).max() <= LOGITS_FP32, part


@every_tower
def test_projector_and_final_norm_give_what_transformers_gives(name):
    model, batch = shared_model(name).model, micro(name)
    features = model.multi_modal_projector(model.vision_tower(batch, Execution(), jnp.float32), None)
    ours, theirs = by_patch(name, features, expected(name)["module:model.multi_modal_projector"])
    assert np.abs(ours - theirs).max() <= LOGITS_FP32
    hidden, _ = shared_model(name)(batch, Execution())
    assert np.abs(at_tokens(name, hidden) - at_tokens(name, expected(name)["module:model.language_model.norm"])).max() <= LOGITS_FP32


def each_layer(stack):
    """The layers one by one."""
    for i in range(stack.depth):
        key = next(k for run in stack.runs for k in run.keys if i in layers_of(k))
        at = layers_of(key).index(i)
        graphdef, state = nnx.split(getattr(stack, key))
        yield nnx.merge(graphdef, jax.tree.map(lambda a, at=at: a[at], state))


@but_siglip
def test_every_attention_and_mlp_of_both_towers_gives_what_transformers_gives(name, monkeypatch):
    batch, model = micro(name), shared_model(name).model
    tower, seen = model.vision_tower, {}
    real = Stack.__call__

    def recording(stack, x, shared, *arguments, **options):
        seen.setdefault(stack.path, (x, shared))
        return real(stack, x, shared, *arguments, **options)

    # What a tower gives its layers.
    monkeypatch.setattr(Stack, "__call__", recording)
    features = model.multi_modal_projector(tower(batch, Execution(), jnp.float32), None)
    [(path, (x, shared))] = seen.items()
    of_pixtral = name in OF_ANY_SIZE
    first, second = ("attention", "feed_forward") if of_pixtral else ("self_attn", "mlp")
    norms = ("attention_norm", "ffn_norm") if of_pixtral else ("layer_norm1", "layer_norm2")
    for i, layer in enumerate(each_layer(tower.transformer.layers if of_pixtral else tower.encoder.layers)):
        attended = getattr(layer, first)(getattr(layer, norms[0])(x), shared, {})
        made = getattr(layer, second)(getattr(layer, norms[1])(x + attended), {})
        for part, state in ((first, attended), (second, made)):
            ours, theirs = by_patch(name, state, expected(name)[f"module:{path}.{i}.{part}"])
            assert np.abs(ours - theirs).max() <= LOGITS_FP32, (i, part)
        x = x + attended + made
    decoder, segments = model.language_model, (batch.segment_starts, batch.segment_lengths)
    shared, x = (
        decoder.shared(batch.position_ids, segments, jnp.float32),
        fuse(decoder.embed_tokens(batch.input_ids), features, batch.vision_index),
    )
    for i, layer in enumerate(each_layer(decoder.layers)):
        attended = layer.self_attn(layer.input_layernorm(x), shared, LayerInputs())[0]
        made = layer.mlp(layer.post_attention_layernorm(x + attended))
        for part, state in (("self_attn", attended), ("mlp", made)):
            theirs = expected(name)[f"module:model.language_model.layers.{i}.{part}"]
            assert np.abs(at_tokens(name, state) - at_tokens(name, theirs)).max() <= LOGITS_FP32, (i, part)
        x = x + attended + made


@but_siglip
def test_bf16_logits_are_as_near_as_those_of_transformers(name):
    ours = at_tokens(name, logits_of(loaded(name, "bfloat16").model, micro(name)))
    assert np.sqrt(np.mean((ours - at_tokens(name, expected(name)["logits"])) ** 2)) <= 1.2 * expected(name)["bf16_error"]


@every_tower
def test_what_is_in_the_padding_changes_nothing(name):
    batch, used = micro(name), USED[name]
    noisy = dataclasses.replace(
        batch, patches=batch.patches.at[:, used:].set(7.0), patch_positions=batch.patch_positions.at[:, used:].set(2)
    )
    assert np.array_equal(runner(name)(batch), runner(name)(noisy))


@two_towers
def test_data_shards_change_nothing(name):
    one, two = runner(name)(micro(name, rows=4)), runner(name)(micro(name, rows=4, shards=2))
    assert np.abs(at_tokens(name, one[:3]) - at_tokens(name, two[:3])).max() <= LOGITS_FP32


@but_siglip
def test_packed_rows_are_the_same_rows_alone(name):
    given, mask = inputs(name), inputs(name)["attention_mask"].astype(bool)
    packed = {key: array for key, array in given.items() if key in ("pixel_values", "image_sizes")}
    packed["input_ids"] = np.concatenate([row[kept] for row, kept in zip(given["input_ids"], mask, strict=True)])[None]
    ours = runner(name)(micro(name, {**packed, "segment_lengths": mask.sum(1)[None]}, tokens=112, rows=1, segments=3))[0, : mask.sum()]
    assert np.abs(ours - at_tokens(name, expected(name)["logits"])).max() <= LOGITS_FP32


@two_towers
def test_remat_changes_nothing(name):
    again = logits_of(shared_model(name), micro(name), execution(True))
    assert np.abs(again - runner(name)(micro(name))).max() <= PACKED_FP32


def unused(name, path, layer):
    """Whether a feature of layer -2 does without: the tower's last layer, and the norm after it."""
    return name not in OF_ANY_SIZE and ("post_layernorm" in path or ("vision_tower.encoder.layers" in path and layer == 2))


@every_tower
def test_every_parameter_of_every_layer_that_a_feature_needs_moves_the_logits(name):
    leaves = flatten_leaves(nnx.to_pure_dict(nnx.state(shared_model(name))))
    batch = micro(name)
    base = at_tokens(name, runner(name)(batch))

    def moved(stacked, layer):
        zeroed = jax.tree.map(lambda a: a.at[layer].set(0), leaves[stacked])
        return np.abs(at_tokens(name, runner(name)(batch, nest({**leaves, stacked: zeroed}))) - base).max()

    places = [(path, i if is_stacked(path) else ...) for path in leaves for i in range(len(expand(path)))]
    still = {(path, layer) for path, layer in places if not moved(path, layer) > SENSITIVITY}
    # Without rotation a bias of the keys adds the same to every logit of a query, which a softmax does not see.
    keys = {(p, i) for p, i in places if "vision_tower" in p and p.endswith("k_proj.bias")}
    assert still == keys | {(path, layer) for path, layer in places if unused(name, path, layer)}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_ANY_SIZE])
def test_images_of_one_size_are_frames_alike(name):
    apart, alike = (micro(name, patches=45, frame=frame) for frame in (None, 9))
    assert alike.patch_segment_starts is None
    assert np.abs(at_tokens(name, runner(name)(alike)) - at_tokens(name, runner(name)(apart))).max() <= PACKED_FP32


FIELDS = ("patches", "position_ids", "patch_segment_lengths", "vision_index", "patch_positions")
# CLIP knows how large an image is, and where each of its patches lies.
OF_SOME_SIZE = ("patch_segment_lengths", "patch_positions")


@pytest.mark.parametrize(("name", "field"), [(n, f) for n in NAMES for f in FIELDS if n != "llava" or f not in OF_SOME_SIZE])
def test_every_field_of_the_batch_moves_the_logits(name, field):
    batch = micro(name)
    other = {"patch_segment_lengths": lambda a: a.at[:, 0].add(a[:, 1]).at[:, 1].set(0)}.get(field, lambda a: 0 * a)
    changed = dataclasses.replace(batch, **{field: other(getattr(batch, field))})
    assert np.abs(runner(name)(changed) - runner(name)(batch)).max() > SENSITIVITY


def test_rows_and_columns_turn_by_different_frequencies(monkeypatch):
    batch = micro("llava_pixtral")
    # Compiled before the patch, whichever test of the process comes first.
    base = runner("llava_pixtral")(batch)
    monkeypatch.setattr(pixtral_module, "frequencies", lambda config, real=pixtral_module.frequencies: real(config)[::-1])
    assert np.abs(logits_of(shared_model("llava_pixtral"), batch) - base).max() > SENSITIVITY


@every_tower
def test_a_text_model_needs_no_image(name):
    ours = runner(name)(micro(name, {"input_ids": inputs(name)["input_ids"][1:2, :17]}, patches=0, rows=1))[0, :17]
    assert np.abs(ours - expected(name)["logits"][1, :17]).max() <= LOGITS_FP32


@two_towers
def test_generation_continues_a_prompt_with_images_as_one_forward_pass_would(name):
    model, given = shared_model(name), inputs(name)
    row = int(given["attention_mask"][0].sum())
    known = row - 3
    caches = model.init_caches(1, row, jnp.float32)
    images = {key: array[:2] for key, array in given.items() if key in ("pixel_values", "image_sizes")}
    prompt = micro(name, {"input_ids": given["input_ids"][:1, :known], **images}, tokens=known, rows=1)
    hidden, caches = model(prompt, Execution(), caches=caches, column=jnp.array([0]))
    segment = jnp.ones((1, 1), jnp.int32)
    for at in range(known, row):
        ids = jnp.asarray(given["input_ids"][:1, at : at + 1])
        step = Batch(input_ids=ids, labels=ids, position_ids=at * segment, segment_starts=0 * segment, segment_lengths=segment)
        hidden, caches = model(step, Execution(), caches=caches, column=jnp.array([at]))
        assert np.abs(model.head().logits(hidden)[0, 0] - expected(name)["logits"][0, at]).max() <= LOGITS_FP32, at


@two_towers
def test_every_parameter_and_every_adapter_that_a_feature_needs_is_trained(name):
    model = loaded(name).model
    attach(model, by_flags(linear_paths(model), targets="all-linear"), LoRAConfig(r=2, init_lora_weights=False))
    graphdef, trainable, frozen = partition(model, full=True)

    @jax.jit
    @jax.grad
    def gradient(trainable):
        whole = nest({**flatten_leaves(trainable), **flatten_leaves(frozen)})
        return jnp.mean(jnp.square(logits_of(nnx.merge(graphdef, whole), micro(name))[:, :34]))

    flat = flatten(gradient(trainable))
    still = {path for path, leaf in flat.items() if not all(map(jnp.any, jax.tree.leaves(leaf)))}
    assert still == {path for path in flat if unused(name, path, 2 if ".layers.2." in path else 0)}
    assert any("multi_modal_projector.linear_1.lora_A" in path for path in flat)
    # What the trainer is told, so that it does not take these adapters for dead ones.
    adapted, spec = [path for path in flat if path.endswith("lora_B")], loaded(name).spec
    assert {path for path in adapted if spec.unused(loaded(name).config, path)} == still & set(adapted)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llava", "fc1"),
        ("llava", "out_proj"),
        ("llava_pixtral", "up_proj"),
        ("llava", "multi_modal_projector.linear_1"),
        ("mistral3", "merging_layer"),
    ],
)
def test_dropout_follows_its_key(name, target):
    model = loaded(name).model
    attach(model, by_pattern(linear_paths(model), [target]), LoRAConfig(r=2, lora_dropout=0.5, init_lora_weights=False))
    graphdef, state = nnx.split(model)
    loss = jax.jit(lambda key: jnp.sum(logits_of(nnx.merge(graphdef, state), micro(name), Execution(dropout_key=key)) ** 2))
    a, again, b = (loss(jax.random.key(seed)) for seed in (0, 0, 1))
    assert a == again != b


@but_siglip
def test_quantising_leaves_tower_and_projector_as_they_are(name):
    kept, formats = loaded(name, load_in_4bit=True).kept, loaded(name, load_in_4bit=True).formats
    paths = linear_paths(shared_model(name))
    assert set(kept) == {p for p in paths if "language_model" not in p}
    assert {path for path, form in formats.items() if form == "Int4"} == {p for p in paths if "language_model" in p}


@every_tower
@pytest.mark.parametrize("full", [False, True])
def test_a_model_is_written_as_it_was_read(name, full, tmp_path):
    model = loaded(name, "bfloat16")
    _, trainable, frozen = partition(model.model, full=full)
    save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=model)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "m" / file).read_bytes() == (reference.reference_folder(name) / file).read_bytes()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llava", {"pixel_values": np.zeros((4, 3, 16, 12))}, r"expected \[images, channels, 12, 12\]"),
        ("llava_pixtral", {"image_sizes": None}, "image_sizes are"),
        ("llava_pixtral", {"image_sizes": np.full((4, 2), 64)}, "image_sizes are"),
        ("llava_pixtral", {"image_sizes": np.full((4, 2), 6)}, "must be multiples of 4 pixels, got image 0 of 6 x 6"),
        ("llava_pixtral", {"image_sizes": np.full((4, 2), 8)}, "row 0: the image at token 3 has 4 features"),
    ],
)
def test_images_that_do_not_fit_are_refused(name, change, message):
    given = {key: array for key, array in {**inputs(name), **change}.items() if array is not None}
    with pytest.raises(ValueError, match=message):
        micro(name, given)
