"""Documents packed into a row train as the same documents alone: loss and every gradient, on whole models."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxlora.adapt import LoRAConfig, attach, partition
from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.load import LoadConfig, load
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import linear_paths
from jaxlora.select import by_flags
from jaxlora.train.step import value_and_grad
from tests.jaxlora.reference import TESTS
from tests.tolerances import PACKED_FP32

# Longer and shorter than mistral's window of 7.
LENGTHS = (11, 3, 18)
XLA = Execution(attention="xla")


@functools.cache
def model_of(model_type):
    loaded = load(TESTS / "golden" / model_type, LoadConfig(dtype="float32"))
    selection = by_flags(linear_paths(loaded.model), vision=False)
    attach(loaded.model, selection, LoRAConfig(r=3, lora_alpha=6, init_lora_weights=False))
    return loaded, partition(loaded.model)


def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(5, 300, n) for n in LENGTHS]


def alone(values):
    rows = documents()
    width = max(LENGTHS)
    ids = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
    mask = np.stack([np.arange(width) < len(row) for row in rows]).astype(int)
    return make_batch([{"input_ids": ids, "labels": np.where(mask, ids, -100), "attention_mask": mask}], values, Shape(32), rows=len(rows))


def packed(values):
    ids = np.concatenate(documents())[None]
    return make_batch([{"input_ids": ids, "labels": ids, "segment_lengths": np.array([LENGTHS])}], values, Shape(32), rows=1, segments=3)


gradient_of = jax.jit(value_and_grad, static_argnums=(0, 4))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2_vl"])
def test_packed_documents_have_the_loss_and_gradients_of_the_same_documents_alone(model_type):
    loaded, (graphdef, trainable, frozen) = model_of(model_type)
    values = dataclasses.replace(loaded.spec.values(loaded.raw_config))
    one, one_gradient = gradient_of(graphdef, trainable, frozen, alone(values), XLA)
    other, other_gradient = gradient_of(graphdef, trainable, frozen, packed(values), XLA)
    assert float(one) == pytest.approx(float(other), abs=PACKED_FP32)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one_gradient), jax.tree.leaves(other_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=PACKED_FP32 * max(float(abs(b).max()), 1), err_msg=jax.tree_util.keystr(path))
        assert np.abs(b).max() > 0, path
