"""The step: what may not change the gradient (accumulation, remat), and what may not change at all (frozen bytes)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlora.adapt import LoRAConfig, attach, partition
from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.load import LoadConfig, load
from jaxlora.models import registry
from jaxlora.nn import offload
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import flatten, layers_alike, linear_paths
from jaxlora.select import by_pattern
from jaxlora.train.optim import OptimConfig, optimizer
from jaxlora.train.remat import execution
from jaxlora.train.step import make_step, merge_trees, value_and_grad
from jaxlora.weights.dense import Dense
from tests.jaxlora.reference import reference_folder
from tests.tolerances import LEAF_REORDERED_FP32, REORDERED_FP32

TEXT = ("llama", "mistral", "qwen2", "qwen3")
LENGTH, SEED = 24, 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
gradient_of = jax.jit(value_and_grad, static_argnums=(0, 4))


@functools.cache
def adapted(model_type="qwen3", quant_type=None):
    """(values, graphdef, trainable, frozen) of a tiny model with adapters whose A and B are random."""
    options = {"load_in_4bit": True, "quant_type": quant_type} if quant_type else {}
    loaded = load(reference_folder(model_type), LoadConfig(dtype="float32", **options))
    config = LoRAConfig(r=4, lora_alpha=8.0, init_lora_weights=False)
    attach(loaded.model, by_pattern(linear_paths(loaded.model), TARGETS), config)
    return loaded.spec.values(loaded.raw_config), *partition(loaded.model)


def rows(count):
    """Rows of ragged lengths with ragged numbers of labels; one has none."""
    rng = np.random.default_rng(SEED)
    lengths, column = rng.integers(8, LENGTH + 1, count), np.arange(LENGTH)
    ids = rng.integers(3, registry.get("qwen3").tiny["vocab_size"], (count, LENGTH), dtype=np.int32)
    mask, prompts = column < lengths[:, None], rng.integers(1, 8, count)
    prompts[1] = LENGTH
    return {"input_ids": ids, "attention_mask": mask.astype(np.int32), "labels": np.where(mask & (column >= prompts[:, None]), ids, -100)}


def split(inputs, values, micro, *, accumulate):
    """Micro-batches of ``micro`` rows; the last may be short, and missing ones are empty."""
    count = len(inputs["input_ids"])
    parts = [{name: array[i : i + micro] for name, array in inputs.items()} for i in range(0, count, micro)]
    return make_batch(parts, values, Shape(LENGTH, 0), rows=micro, accumulate=accumulate)


def distance(ours, theirs):
    """The relative difference of the whole gradient."""
    ours, theirs = flatten(ours), flatten(theirs)
    assert set(ours) == set(theirs)
    squares = [(jnp.sum(jnp.square(ours[path] - theirs[path])), jnp.sum(jnp.square(theirs[path]))) for path in theirs]
    return float(jnp.sqrt(sum(s for s, _ in squares) / sum(s for _, s in squares)))


def largest_distance(ours, theirs):
    """The largest relative difference of a leaf."""
    theirs = flatten(theirs)
    return max(distance({path: leaf}, {path: theirs[path]}) for path, leaf in flatten(ours).items())


@pytest.mark.parametrize("count", [8, 5], ids=["full", "last partial window"])
def test_accumulating_four_micro_batches_is_one_batch_of_eight(count):
    values, graphdef, trainable, frozen = adapted()
    inputs = rows(count)
    loss, gradient = gradient_of(graphdef, trainable, frozen, split(inputs, values, 8, accumulate=1), Execution())
    accumulated = gradient_of(graphdef, trainable, frozen, split(inputs, values, 2, accumulate=4), Execution())
    assert abs(float(accumulated[0] / loss) - 1) <= REORDERED_FP32
    assert distance(accumulated[1], gradient) <= REORDERED_FP32
    assert largest_distance(accumulated[1], gradient) <= LEAF_REORDERED_FP32


@functools.cache
def gradient_under(policy, **options):
    values, graphdef, trainable, frozen = adapted()
    return gradient_of(graphdef, trainable, frozen, split(rows(2), values, 2, accumulate=1), execution(policy, **options))


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (True, {}),
        ("unsloth", {"mlp_tile": 8}),
        ("attention", {"mlp_tile": 8}),
        ("dots", {}),
        ("dots", {"unroll": 1}),
        (True, {"unroll": 99}),
        ("attention", {"unroll": 99}),
    ],
    ids=["True", "unsloth", "attention", "dots", "dots in a loop", "unrolled", "attention, unrolled"],
)
def test_remat_changes_neither_loss_nor_gradient(policy, options):
    (loss, gradient), (expected_loss, expected) = gradient_under(policy, **options), gradient_under(False)
    assert abs(float(loss / expected_loss) - 1) <= REORDERED_FP32
    assert distance(gradient, expected) <= REORDERED_FP32
    assert largest_distance(gradient, expected) <= LEAF_REORDERED_FP32


@pytest.mark.parametrize("policy", [True, "attention", "dots", "unsloth"])
def test_wide_gradients_of_one_pass_are_the_others_under_every_policy(policy, in_one_pass):
    expected_loss, expected = gradient_under(False)
    ran = in_one_pass()
    values, graphdef, trainable, frozen = adapted()
    batch = split(rows(2), values, 2, accumulate=1)
    loss, gradient = jax.jit(lambda *trees: value_and_grad(graphdef, *trees, execution(policy)))(trainable, frozen, batch)
    assert abs(float(loss / expected_loss) - 1) <= REORDERED_FP32
    assert largest_distance(gradient, expected) <= LEAF_REORDERED_FP32
    assert ran


@pytest.mark.parametrize("constant", ["_LONG", "_FLOP_A_BYTE"], ids=["its output", "all that it needs"])
def test_attention_that_is_kept_in_host_memory_changes_neither_loss_nor_gradient(monkeypatch, constant):
    monkeypatch.setattr(offload, constant, 0)
    (loss, gradient), (expected_loss, expected) = gradient_under.__wrapped__("unsloth"), gradient_under(False)
    assert abs(float(loss / expected_loss) - 1) <= REORDERED_FP32
    assert largest_distance(gradient, expected) <= LEAF_REORDERED_FP32


@pytest.mark.parametrize("quant_type", ["int4", "nf4"])
def test_all_that_waits_in_host_memory_belongs_to_tokens(monkeypatch, quant_type):
    monkeypatch.setattr(offload, "_FLOP_A_BYTE", 0)
    kept, linearise = [], offload.linearise

    def watched(*arguments, **options):
        made = linearise(*arguments, **options)
        kept.extend(a.shape for a in made[1])
        return made

    monkeypatch.setattr(offload, "linearise", watched)
    values, graphdef, trainable, frozen = adapted("qwen3", quant_type)
    batch = split(rows(2), values, 2, accumulate=1)
    jax.eval_shape(lambda *trees: value_and_grad(graphdef, *trees, execution("unsloth")), trainable, frozen, batch)
    # Rows and tokens, tokens alone, and of the log-sum-exp rows, heads and tokens.
    assert {shape for shape in kept if len(shape) == 4} and {shape for shape in kept if len(shape) == 2}
    assert {shape for shape in kept if shape[:2] != (2, LENGTH) and shape[0] != 2 * LENGTH and shape[::2] != (2, LENGTH)} == set()


@pytest.mark.parametrize("model_type", TEXT)
def test_every_trainable_leaf_of_an_adapter_has_a_gradient(model_type):
    values, graphdef, trainable, frozen = adapted(model_type)
    _, gradient = gradient_of(graphdef, trainable, frozen, split(rows(2), values, 2, accumulate=1), Execution())
    assert [path for path, leaf in flatten(gradient).items() if not np.any(leaf)] == []


@pytest.mark.parametrize("model_type", TEXT)
def test_every_leaf_has_a_gradient_in_full_fine_tuning(model_type):
    loaded = load(reference_folder(model_type), LoadConfig(dtype="float32"))
    graphdef, trainable, frozen = partition(loaded.model, full=True)
    batch = split(rows(2), loaded.spec.values(loaded.raw_config), 2, accumulate=1)
    _, gradient = gradient_of(graphdef, trainable, frozen, batch, Execution())
    dead = [path for path, leaf in flatten(gradient).items() if not np.any(jax.tree.leaves(leaf)[0])]
    assert dead == []


@pytest.mark.parametrize("full", [False, True], ids=["adapters", "full"])
def test_weights_that_are_multiplied_in_place_are_the_same(full, in_one_pass, monkeypatch):
    """And so are the gradients, by the weights themselves too."""
    if full:
        loaded = load(reference_folder("qwen3"), LoadConfig(dtype="float32"))
        values, parts = loaded.spec.values(loaded.raw_config), partition(loaded.model, full=True)
    else:
        in_one_pass("lora_input", "adapted_activation", "gated_gradients")
        values, *parts = adapted()
    graphdef, *trees = parts
    assert layers_alike(nnx.merge(graphdef, merge_trees(*trees)))
    how, batch, taken, in_place = execution("dots"), split(rows(2), values, 2, accumulate=1), [], Dense._in_place
    monkeypatch.setattr(Dense, "_in_place", lambda weight: taken.append(weight) or in_place(weight))

    def gradient(how):
        loss, gradient = jax.jit(lambda *trees: value_and_grad(graphdef, *trees, how))(*trees, batch)
        return loss, {path: jax.tree.leaves(leaf)[0] for path, leaf in flatten(gradient).items()}

    expected_loss, expected = gradient(how)
    assert not taken
    loss, made = gradient(dataclasses.replace(how, scan=dataclasses.replace(how.scan, in_place=True)))
    assert len(taken) >= 3
    assert abs(float(loss / expected_loss) - 1) <= REORDERED_FP32
    assert largest_distance(made, expected) <= LEAF_REORDERED_FP32


@pytest.mark.parametrize("quant_type", [None, "int4", "nf4"])
def test_training_changes_no_frozen_byte(quant_type):
    values, graphdef, trainable, frozen = adapted("qwen3", quant_type)
    before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(frozen)]
    tx = optimizer(OptimConfig(learning_rate=1e-2, lr_scheduler_type="constant"))
    # The step donates what it trains.
    start = jax.tree.map(jnp.copy, trainable)
    step = make_step(graphdef, tx, Execution())
    trained, _, metrics = step(start, tx.init(start), frozen, split(rows(2), values, 2, accumulate=1), 0)
    assert bool(metrics["finite"])
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(frozen)] == before
    assert all(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(trainable), strict=True))
