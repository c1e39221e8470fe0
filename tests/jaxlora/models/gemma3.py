"""Gemma 3's reference, and batches and forward passes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.models.gemma3 import SPEC
from jaxlora.models.spec import Batch
from jaxlora.nn.decoder import Execution
from tests.jaxlora import reference

VALUES = SPEC.values(SPEC.tiny)
# 34 tokens, and 4 images of 36 patches, are used.
TOKENS, PATCHES, USED, IMAGES = 40, 160, 144, 5


@functools.cache
def expected() -> dict[str, np.ndarray]:
    """What transformers computed."""
    return reference.expected("gemma3")


def inputs() -> dict[str, np.ndarray]:
    """The reference's inputs."""
    return {name: expected()[name] for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values")}


def at_tokens(array):
    """The values at tokens."""
    mask = expected()["attention_mask"].astype(bool)
    return np.asarray(array)[:, : mask.shape[1]][mask]


def micro(given=None, *, tokens=TOKENS, patches=PATCHES, rows=3, **options) -> Batch:
    """One micro-batch on the device: the reference's inputs unless others are given."""
    batch = make_batch([given or inputs()], VALUES, Shape(tokens, patches), rows=rows, images=IMAGES, **options)
    return jax.tree.map(lambda a: jnp.asarray(a[0]), batch)


def loaded(dtype="float32", **options):
    """A model that a test may change."""
    return reference.fresh("gemma3", dtype=dtype, **options)


@functools.cache
def shared_model():
    """A model that no test changes."""
    return loaded().model


def logits_of(model, batch, execution=Execution()):  # noqa: B008
    """Logits of a whole forward pass."""
    return model.head().logits(model(batch, execution)[0])


@functools.cache
def runner():
    """(batch, tree or the loaded one) -> logits, compiled once a shape."""
    graphdef, state = nnx.split(shared_model())
    compiled = jax.jit(lambda tree, batch: logits_of(nnx.merge(graphdef, tree), batch))
    return lambda batch, tree=None: np.asarray(compiled(nnx.to_pure_dict(state) if tree is None else tree, batch))
