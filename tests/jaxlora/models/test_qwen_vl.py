"""Every Qwen-VL model computes what transformers computes, on images of several sizes and a video, by the files of make_qwen_vl.py."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conversion.safetensors_io import open_checkpoint
from jaxlora.adapt import partition
from jaxlora.export import save_merged
from jaxlora.load import LoadConfig, load
from jaxlora.models import registry
from jaxlora.models.spec import Batch
from jaxlora.nn.decoder import Execution
from jaxlora.nn.scan import Run
from jaxlora.nn.stack import Stack, flatten, flatten_leaves, linear_paths, nest
from jaxlora.nn.vision import run_blocks
from jaxlora.select import by_flags, expand, is_stacked
from jaxlora.weights.dense import Dense
from tests.jaxlora import reference
from tests.jaxlora.models import qwen_vl
from tests.jaxlora.models.qwen_vl import FAMILY, TOKENS, USED, at_tokens, expected, inputs_of, kept, loaded, micro, runner, shared_model
from tests.tolerances import LOGITS_FP32, PACKED_FP32, SENSITIVITY

every_model = pytest.mark.parametrize("model_type", FAMILY)


@every_model
def test_logits_are_those_of_transformers(model_type):
    ours = runner(model_type)(micro(model_type))
    assert np.abs(at_tokens(model_type, ours) - at_tokens(model_type, expected(model_type)["logits"])).max() <= LOGITS_FP32


@every_model
def test_every_block_and_every_merger_gives_what_transformers_gives(model_type):
    batch, tower = micro(model_type), shared_model(model_type).model.visual
    found, depth = {}, tower.config.depth
    _, states = run_blocks(tower.config, tower.blocks, tower.embed(batch, jnp.float32), batch, Execution(), collect=range(1, depth + 1))
    found = {f"model.visual.blocks.{i}": state for i, state in enumerate(states)}
    found["model.visual.merger"], of_layers = tower(batch, Execution(), jnp.float32)
    found |= {f"model.visual.deepstack_merger_list.{i}": own for i, own in enumerate([] if of_layers is None else of_layers)}
    for name, ours in found.items():
        theirs = expected(model_type)[f"module:{name}"]
        assert np.abs(ours[0, : len(theirs)] - theirs).max() <= LOGITS_FP32, name


@every_model
def test_every_decoder_layer_gives_what_transformers_gives(model_type, monkeypatch):
    model, states = shared_model(model_type).model, {}
    layers, real = model.language_model.layers, Stack.__call__

    def recording(stack, *arguments, **options):
        if stack is not layers:
            return real(stack, *arguments, **options)
        x, collected, outs = real(stack, *arguments, **options, collect=range(1, stack.depth + 1))
        states.update(enumerate(collected))
        return x, collected, outs

    monkeypatch.setattr(Stack, "__call__", recording)
    model(micro(model_type), Execution(), caches=None, column=None)
    assert len(states) == layers.depth
    for i, ours in states.items():
        theirs = expected(model_type)[f"module:model.language_model.layers.{i}"]
        assert np.abs(at_tokens(model_type, ours) - at_tokens(model_type, theirs)).max() <= LOGITS_FP32, i


@every_model
def test_positions_are_those_of_transformers_with_its_rule_for_videos(model_type):
    mask = kept(model_type)
    ours = np.asarray(micro(model_type).position_ids)[:, :, : mask.shape[1]]
    assert np.array_equal(ours[:, mask], expected(model_type)["position_ids"][:, mask])


@every_model
def test_bf16_logits_are_as_near_as_those_of_transformers(model_type):
    ours = qwen_vl.logits_of(loaded(model_type, jnp.bfloat16), micro(model_type))
    error = np.sqrt(np.mean((at_tokens(model_type, ours) - at_tokens(model_type, expected(model_type)["logits"])) ** 2))
    assert error <= 1.2 * expected(model_type)["bf16_error"]


@every_model
def test_an_image_is_the_same_beside_others_and_beside_padding(model_type):
    inputs, values = inputs_of(model_type), qwen_vl.values_of(model_type)
    grid, start = tuple(inputs["image_grid_thw"][1]), int(inputs["image_grid_thw"][0].prod())
    pixels = inputs["pixel_values"][start : start + int(np.prod(grid))]
    ids = np.full((1, len(pixels) // 4), values.vision.image_token_id)
    alone = micro(model_type, {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": np.array([grid])}, patches=len(pixels), rows=1)
    together = qwen_vl.features_of(shared_model(model_type), micro(model_type))[0, start // 4 : (start + len(pixels)) // 4]
    assert np.abs(qwen_vl.features_of(shared_model(model_type), alone)[0] - together).max() <= PACKED_FP32


@every_model
def test_frames_that_are_alike_have_the_features_that_they_have_as_segments(model_type):
    values, pixels = qwen_vl.values_of(model_type), inputs_of(model_type)["pixel_values"]
    grids = np.array([(1, 4, 6), (1, 6, 4), (1, 2, 12)])
    ids = np.full((1, 18), values.vision.image_token_id)
    inputs = {"input_ids": ids, "pixel_values": pixels[:72], "image_grid_thw": grids}
    batches = [micro(model_type, inputs, patches=96, rows=1, frame=frame) for frame in (None, 24)]
    assert [batch.patch_segment_starts is None for batch in batches] == [False, True]
    apart, alike = (qwen_vl.features_of(shared_model(model_type), batch)[0, :18] for batch in batches)
    assert np.abs(apart - alike).max() <= PACKED_FP32


@every_model
def test_what_is_in_the_padding_changes_nothing(model_type):
    batch = micro(model_type)
    noisy = {"patches": batch.patches.at[:, USED:].set(7.0), "patch_positions": batch.patch_positions.at[:, USED:].set(3)}
    assert np.array_equal(runner(model_type)(batch), runner(model_type)(dataclasses.replace(batch, **noisy)))


@every_model
def test_every_parameter_and_every_adapter_is_trained(model_type):
    graphdef, trainable, frozen = qwen_vl.adapted(model_type, lambda paths: by_flags(paths, targets="all-linear"), full=True)
    gradient = flatten(jax.jit(jax.grad(qwen_vl.square_loss(graphdef, frozen, micro(model_type))))(trainable))
    linears = len(linear_paths(shared_model(model_type))) - 1
    assert sum("lora" in path for path in gradient) == 2 * linears
    assert not [path for path, leaf in gradient.items() if not all(map(jnp.any, jax.tree.leaves(leaf)))]


@every_model
def test_generation_continues_the_prompt_as_one_forward_pass_would(model_type):
    model, inputs = shared_model(model_type), inputs_of(model_type)
    row = int(kept(model_type)[0].sum())
    ids = jnp.asarray(inputs["input_ids"][:1, :row])
    grids = inputs["image_grid_thw"][:2]
    pictures = {"pixel_values": inputs["pixel_values"][: grids.prod(-1).sum()], "image_grid_thw": grids}
    caches = model.init_caches(1, TOKENS, jnp.float32)
    prompt = micro(model_type, {"input_ids": np.asarray(ids[:, :-1]), **pictures}, rows=1)
    _, caches = model(prompt, Execution(), caches=caches, column=jnp.array([0]))
    last = jnp.asarray(expected(model_type)["position_ids"][:, :1, row - 1 : row])
    segment = jnp.ones((1, 1), jnp.int32)
    step = Batch(input_ids=ids[:, -1:], labels=ids[:, -1:], position_ids=last, segment_starts=0 * segment, segment_lengths=segment)
    hidden, _ = model(step, Execution(), caches=caches, column=jnp.array([row - 1]))
    assert np.abs(model.head().logits(hidden)[0, 0] - expected(model_type)["logits"][0, row - 1]).max() <= LOGITS_FP32


@every_model
def test_every_parameter_of_every_layer_moves_the_logits(model_type):
    leaves = flatten_leaves(nnx.to_pure_dict(nnx.state(shared_model(model_type))))
    batch, run = micro(model_type), runner(model_type)
    base = at_tokens(model_type, run(batch))

    def moved(stacked, layer):
        without = jax.tree.map(lambda a: a.at[layer].set(0), leaves[stacked])
        return np.abs(at_tokens(model_type, run(batch, nest({**leaves, stacked: without}))) - base).max()

    places = [(path, i if is_stacked(path) else ...) for path in leaves for i in range(len(expand(path)))]
    assert not [(path, layer) for path, layer in places if not moved(path, layer) > SENSITIVITY]


# Labels are the loss's; a segment that starts where nothing begins is empty.
UNREAD = {"labels", "segment_starts", "patch_segment_starts", "patch_window_starts"}


def _joined(lengths):
    """The first two segments as one."""
    return lengths.at[..., 0].add(lengths[..., 1]).at[..., 1].set(0)


def _shortened(lengths):
    """The first segment without its second half."""
    return lengths.at[..., 0].set(lengths[..., 0] // 2)


@every_model
def test_every_field_of_the_batch_moves_the_logits(model_type):
    batch, run = micro(model_type), runner(model_type)
    base = run(batch)
    changes = {"patch_segment_lengths": _joined, "patch_window_lengths": _shortened, "segment_lengths": lambda a: a // 2}
    for name, value in vars(batch).items():
        if value is None or name in UNREAD:
            continue
        changed = changes.get(name, lambda a: 0 * a)(value)
        assert np.abs(at_tokens(model_type, run(dataclasses.replace(batch, **{name: changed})) - base)).max() > SENSITIVITY, name


@every_model
def test_the_model_holds_the_file_bit_for_bit_under_its_names(model_type):
    checkpoint = open_checkpoint(reference.reference_folder(model_type))
    held = flatten(nnx.to_pure_dict(nnx.state(loaded(model_type, jnp.bfloat16))))
    arrays = {path: leaf.array if isinstance(leaf, Dense) else leaf for path, leaf in held.items()}
    hub = registry.get(model_type).rules.spellings[0]
    assert sorted(hub.to_disk(path) for path in arrays) == sorted(checkpoint.names())
    for path, array in arrays.items():
        assert np.asarray(array).tobytes() == np.asarray(checkpoint.read(hub.to_disk(path))).tobytes(), path


@every_model
def test_every_tensor_comes_back_from_the_device_bit_for_bit(model_type, tmp_path):
    folder = reference.reference_folder(model_type)
    whole = load(folder, LoadConfig(dtype="bfloat16"))
    _, trainable, frozen = partition(whole.model, full=True)
    save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=whole)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (folder / name).read_bytes()


@every_model
@pytest.mark.parametrize("name", ["config.json", "config_v5.json"])
def test_the_hubs_config_and_that_of_transformers_5_mean_the_same(model_type, name):
    spec, raw = registry.get(model_type), json.loads((reference.reference_folder(model_type) / name).read_text())
    assert spec.read(raw) == spec.read(spec.tiny)
    assert spec.values(raw) == qwen_vl.values_of(model_type)


@every_model
def test_a_key_that_nobody_models_is_refused(model_type):
    spec = registry.get(model_type)
    with pytest.raises(ValueError, match="hidden_sise"):
        spec.read({**spec.tiny, "vision_config": {**spec.tiny["vision_config"], "hidden_sise": 3}})


@every_model
def test_quantised_loading_keeps_the_merger_and_the_head_in_16_bits(model_type):
    model = load(reference.reference_folder(model_type), LoadConfig(load_in_4bit=True, dtype="float32"))
    merger = {path for path in linear_paths(model.model) if "merger" in path}
    assert set(model.kept) == merger | {"lm_head"}
    assert set(model.formats) == set(linear_paths(model.model)) - set(model.kept)


TEXT_7B = {
    **{"hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 128000, "max_window_layers": 28},
    **{"num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    **{"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "use_sliding_window": False, "vocab_size": 152064},
}
TOKENS_7B = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654}
VISION_7B = {
    **{"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3, "patch_size": 14},
    **{"out_hidden_size": 3584, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2, "tokens_per_second": 2},
    **{"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
}
# Qwen2.5-VL-7B as on the hub, and as transformers 4.53 saves it again.
HUB = {
    **{"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], "torch_dtype": "bfloat16"},
    **{**TEXT_7B, **TOKENS_7B, "image_token_id": 151655, "video_token_id": 151656, "sliding_window": 32768, "tie_word_embeddings": False},
    **{"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vision_config": VISION_7B},
}
SAVED_AGAIN = {
    **HUB,
    "rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [16, 24, 24]},
    "vision_config": {**VISION_7B, "model_type": "qwen2_5_vl", "in_channels": 3, "initializer_range": 0.02, "torch_dtype": "float32"},
    "text_config": {
        **{**TEXT_7B, **TOKENS_7B, "model_type": "qwen2_5_vl_text", "image_token_id": None, "video_token_id": None, "sliding_window": None},
        **{"layer_types": ["full_attention"] * 28, "torch_dtype": "float32"},
        "rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [16, 24, 24]},
    },
}


def test_a_config_that_transformers_4_saved_again_means_what_the_hubs_means():
    spec = registry.get("qwen2_5_vl")
    assert spec.read(SAVED_AGAIN) == spec.read(HUB)
    assert spec.values(SAVED_AGAIN) == spec.values(HUB)


def test_the_windowed_blocks_of_a_real_tower_are_one_run():
    spec = registry.get("qwen2_5_vl")
    config = spec.read(HUB)
    assert (config.vision.window, config.vision.mlp_dim) == (4, 3420)
    assert spec.build(config).model.visual.blocks.runs == (Run(start=0, kinds=(0,) * 7 + (1,), repeats=4),)


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("qwen2_5_vl", {"vision_config": {"window_size": 4}}, "window_size = 4 pixels is less than one merged cell of 8"),
        ("qwen2_5_vl", {"vision_config": {"fullatt_block_indexes": [1, 7]}}, "block 7 is named, but there are 4 blocks"),
        ("qwen2_5_vl", {"vision_config": {"hidden_act": "gelu"}}, "hidden_act = 'gelu' is not implemented"),
        ("qwen3_vl", {"vision_config": {"num_position_embeddings": 26}}, "num_position_embeddings = 26 is no square"),
        ("qwen3_vl", {"vision_config": {"deepstack_visual_indexes": [0, 1, 2, 3, 3]}}, "after 5 blocks, but the text model has 4 layers"),
        ("qwen3_vl", {"vision_config": {"window_size": 112}}, "window_size = 112 is unknown"),
        ("qwen3_vl", {"text_config": {"rope_scaling": {"mrope_interleaved": False}}}, "mrope_interleaved = False is not implemented"),
        ("qwen3_vl", {"text_config": {"head_dim": 24}}, "has 10 frequencies, expected 12"),
    ],
)
def test_what_is_not_modelled_is_refused(model_type, change, message):
    spec = registry.get(model_type)
    with pytest.raises(ValueError) as caught:
        spec.read({**spec.tiny, **{part: {**spec.tiny[part], **keys} for part, keys in change.items()}})
    assert message in str(caught.value)
