"""Llama 3.2 Vision's reference, and batches and forward passes of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.models.mllama import SPEC
from jaxlora.models.spec import Batch
from jaxlora.nn.decoder import Execution
from tests.jaxlora import reference

VALUES = SPEC.values(SPEC.tiny)
# transformers has tokens that see no image attend to every place of their row.
HF5_VALUES = dataclasses.replace(VALUES, vision=dataclasses.replace(VALUES.vision, unseen="hf5"))
INPUTS = ("input_ids", "attention_mask", "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")
# 18 tokens are used, and 6 places for images of 4 tiles of 16 patches; a room of 400 has 16 patches that are no image's.
TOKENS, PATCHES = 24, 400


@functools.cache
def expected() -> dict[str, np.ndarray]:
    """What transformers computed."""
    return reference.expected("mllama")


def inputs() -> dict[str, np.ndarray]:
    """The reference's inputs."""
    return {name: expected()[name] for name in INPUTS}


def at_tokens(array):
    """The values at tokens."""
    mask = expected()["attention_mask"].astype(bool)
    return np.asarray(array)[:, : mask.shape[1]][mask]


def micro(given=None, *, values=HF5_VALUES, tokens=TOKENS, patches=PATCHES, rows=3, **options) -> Batch:
    """One micro-batch on the device: the reference's inputs unless others are given."""
    batch = make_batch([given or inputs()], values, Shape(tokens, patches), rows=rows, **options)
    return jax.tree.map(lambda a: jnp.asarray(a[0]), batch)


def loaded(dtype="float32", *, compat="hf5", **options):
    """A model that a test may change."""
    made = reference.fresh("mllama", dtype=dtype, **options)
    made.model.model.vision_model.config = dataclasses.replace(made.config.vision, compat=compat)
    return made


@functools.cache
def shared_model():
    """A model that no test changes."""
    return loaded().model


def logits_of(model, batch, execution=Execution()):  # noqa: B008
    """Logits of a whole forward pass."""
    return model.head().logits(model(batch, execution)[0])


@functools.cache
def runner(compat="hf5"):
    """(batch, tree or the loaded one) -> logits, compiled once a shape."""
    graphdef, state = nnx.split(loaded(compat=compat).model)
    compiled = jax.jit(lambda tree, batch: logits_of(nnx.merge(graphdef, tree), batch))
    return lambda batch, tree=None: np.asarray(compiled(nnx.to_pure_dict(state) if tree is None else tree, batch))
