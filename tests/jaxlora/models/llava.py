"""LLaVA's references, one for each tower, and batches and forward passes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.load import LoadConfig, load
from jaxlora.models.spec import Batch
from jaxlora.nn.decoder import Execution
from tests.jaxlora import reference
from tests.jaxlora.models.llava_configs import CONFIGS

NAMES = tuple(CONFIGS)
INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
# Patches that are used, of those that there is room for.
USED = {name: 8 + 15 + 6 + 9 if "pixtral" in name else 4 * 9 for name in NAMES}
TOKENS, PATCHES, IMAGES = 56, 44, 5


@functools.cache
def expected(name) -> dict[str, np.ndarray]:
    """What transformers computed."""
    return reference.expected(name)


def inputs(name) -> dict[str, np.ndarray]:
    """The reference's inputs."""
    return {key: expected(name)[key] for key in INPUTS if key in expected(name)}


@functools.cache
def values(name):
    """What batches need."""
    return reference.spec_of(name).values(reference.config_of(name))


def at_tokens(name, array):
    """The values at tokens."""
    mask = expected(name)["attention_mask"].astype(bool)
    return np.asarray(array)[:, : mask.shape[1]][mask]


def micro(name, given=None, *, tokens=TOKENS, patches=PATCHES, rows=3, **options) -> Batch:
    """One micro-batch on the device: the reference's inputs unless others are given."""
    batch = make_batch([given or inputs(name)], values(name), Shape(tokens, patches), rows=rows, images=IMAGES, **options)
    return jax.tree.map(lambda a: jnp.asarray(a[0]), batch)


def loaded(name, dtype="float32", **options):
    """A model that a test may change."""
    return load(reference.reference_folder(name), LoadConfig(dtype=dtype, **options))


@functools.cache
def shared_model(name):
    """A model that no test changes."""
    return loaded(name).model


def logits_of(model, batch, execution=Execution()):  # noqa: B008
    """Logits of a whole forward pass."""
    return model.head().logits(model(batch, execution)[0])


@functools.cache
def runner(name):
    """(batch, tree or the loaded one) -> logits, compiled once a shape."""
    graphdef, state = nnx.split(shared_model(name))
    compiled = jax.jit(lambda tree, batch: logits_of(nnx.merge(graphdef, tree), batch))
    return lambda batch, tree=None: np.asarray(compiled(nnx.to_pure_dict(state) if tree is None else tree, batch))
