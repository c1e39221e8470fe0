"""LLaVA's references, one for each tower, and Mistral 3's; batches and forward passes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.data.positions import patch_positions
from jaxlora.models.spec import Batch
from jaxlora.nn.decoder import Execution
from tests.jaxlora import reference
from tests.jaxlora.models.llava_configs import CONFIGS

NAMES = tuple(CONFIGS)
INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
# (rows, columns) of each image's features, as tests/oracle/make_llava.py has them, where images have their own sizes.
GRIDS = [(2, 4), (5, 3), (1, 6), (3, 3)]
OF_ANY_SIZE = ("llava_pixtral", "mistral3")
FEATURES = {name: sum(h * w for h, w in GRIDS) if name in OF_ANY_SIZE else 4 * 9 for name in NAMES}
# The side of a feature in patches.
MERGE = {name: CONFIGS[name].get("spatial_merge_size", 1) for name in NAMES}
# Patches that are used, of those that there is room for.
USED = {name: FEATURES[name] * MERGE[name] ** 2 for name in NAMES}
PATCHES = {name: 44 * MERGE[name] ** 2 for name in NAMES}
TOKENS, IMAGES = 56, 5


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


def by_patch(name, ours, theirs):
    """(ours, theirs) [rows, D] of patches or features; CLIP's have a class token before each image's patches."""
    rows = theirs.reshape(-1, theirs.shape[-1])
    if len(rows) == USED[name] and MERGE[name] > 1:
        # Ours are in merge-block order.
        starts = np.cumsum([0, *(h * w * MERGE[name] ** 2 for h, w in GRIDS)])
        grids = [(1, h * MERGE[name], w * MERGE[name]) for h, w in GRIDS]
        cells = [patch_positions(grid, MERGE[name]) for grid in grids]
        rows = rows[np.concatenate([at + cell @ [grid[2], 1] for at, cell, grid in zip(starts, cells, grids, strict=False)])]
    return np.asarray(ours)[0, : len(rows)], rows


def micro(name, given=None, *, tokens=TOKENS, patches=None, frame=None, rows=3, **options) -> Batch:
    """One micro-batch on the device: the reference's inputs unless others are given."""
    shape = Shape(tokens, PATCHES[name] if patches is None else patches, frame)
    batch = make_batch([given or inputs(name)], values(name), shape, rows=rows, images=IMAGES, **options)
    return jax.tree.map(lambda a: jnp.asarray(a[0]), batch)


def loaded(name, dtype="float32", **options):
    """A model that a test may change."""
    return reference.fresh(name, dtype=dtype, **options)


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
