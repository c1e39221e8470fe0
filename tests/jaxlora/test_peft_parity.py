"""Loss and gradients against PEFT and transformers: 20 steps of LoRA and QLoRA, every option, full fine-tuning of a tied model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlora.adapt import attach_from, partition
from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.load import LoadConfig, load
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import flatten
from jaxlora.train.optim import OptimConfig, optimizer
from jaxlora.train.step import make_step, merge_trees, value_and_grad
from tests.jaxlora import peft_reference as reference
from tests.tolerances import GRADIENT_COSINE, GRADIENT_NORM, LOGITS_FP32, LOSS_FP32

LIVE = [pytest.param(name, marks=pytest.mark.oracle) for name in reference.LIVE_MODELS]
CASES = [*reference.CASES, *LIVE]
LATER = 5
OPTIMIZER = OptimConfig(
    learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=2, total_steps=reference.STEPS, weight_decay=0.01, max_grad_norm=1.0
)


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, tree, batch):
    model = nnx.merge(graphdef, tree)
    return model.head().logits(model(batch, Execution())[0])


gradient_of = jax.jit(value_and_grad, static_argnums=(0, 4))


def load_case(case):
    options = {"load_in_4bit": True, "quant_type": "nf4"} if case == "qlora" else {}
    return load(reference.base_of(case), LoadConfig(dtype="float32", **options))


def attached(case, which):
    loaded = load_case(case)
    config = attach_from(loaded.model, reference.peft_folder() / case / which, loaded.spec.rules)
    return loaded, partition(loaded.model, config.modules_to_save)


def batch(loaded, step):
    with np.load(reference.peft_folder() / "batches.npz") as file:
        inputs = {name: array[step] for name, array in file.items()}
    values = loaded.spec.values(loaded.raw_config)
    return make_batch([inputs], values, Shape(reference.LENGTH, 0), rows=reference.ROWS)


def arrays_by_path(tree):
    return {path: np.asarray(jax.tree.leaves(leaf)[0]) for path, leaf in flatten(tree).items()}


@functools.cache
def trained(case):
    """Losses, and the gradient at step LATER, of training from B = 0."""
    loaded, (graphdef, trainable, frozen) = attached(case, "zero")
    tx = optimizer(OPTIMIZER)
    step, state, losses, later = make_step(graphdef, tx, Execution()), tx.init(trainable), [], {}
    for i in range(reference.STEPS):
        if i == LATER:
            later = arrays_by_path(gradient_of(graphdef, trainable, frozen, batch(loaded, i), Execution())[1])
        trainable, state, metrics = step(trainable, state, frozen, batch(loaded, i), i)
        losses.append(float(metrics["loss"]))
    return np.array(losses), later


def assert_same_gradients(ours, expected, prefix):
    theirs = {key.removeprefix(prefix): array for key, array in expected.items() if key.startswith(prefix)}
    assert set(ours) == set(theirs)
    for path, b in theirs.items():
        a = ours[path]
        norms = np.linalg.norm(a), np.linalg.norm(b)
        assert np.vdot(a, b) / (norms[0] * norms[1]) >= GRADIENT_COSINE, path
        assert abs(norms[0] / norms[1] - 1) <= GRADIENT_NORM, path


@pytest.mark.parametrize("case", CASES)
def test_loss_of_every_step_is_pefts(case):
    losses, _ = trained(case)
    assert np.abs(losses - reference.expected(case)["losses"]).max() <= LOSS_FP32


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_pefts_after_five_steps_from_b_zero(case):
    _, later = trained(case)
    assert_same_gradients(later, reference.expected(case), "later:")


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_pefts_with_a_and_b_random(case):
    loaded, (graphdef, trainable, frozen) = attached(case, "random")
    gradient = arrays_by_path(gradient_of(graphdef, trainable, frozen, batch(loaded, 0), Execution())[1])
    assert all(np.any(array) for array in gradient.values())
    assert_same_gradients(gradient, reference.expected(case), "random:")


@pytest.mark.parametrize("case", CASES)
def test_adapter_that_peft_wrote_gives_pefts_logits(case):
    loaded, (graphdef, trainable, frozen) = attached(case, "random")
    with np.load(reference.peft_folder() / "batches.npz") as file:
        mask = file["attention_mask"][0].astype(bool)
    micro = jax.tree.map(lambda a: jnp.asarray(a[0]), batch(loaded, 0))
    difference = np.asarray(forward(graphdef, merge_trees(trainable, frozen), micro)) - reference.expected(case)["logits"]
    assert np.abs(difference[mask]).max() <= LOGITS_FP32


def test_full_fine_tuning_of_a_tied_model_has_transformers_gradient_for_every_tensor():
    loaded = load_case("full")
    graphdef, trainable, frozen = partition(loaded.model, full=True)
    gradient = gradient_of(graphdef, trainable, frozen, batch(loaded, 0), Execution())[1]
    assert loaded.config.tie_word_embeddings
    assert_same_gradients(arrays_by_path(gradient), reference.expected("full"), "random:")
