"""A model of a real geometry with random weights, made on the device: no files, so that a benchmark starts in seconds."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlora.load import KEPT
from jaxlora.models import registry
from jaxlora.nn.linear import Linear
from jaxlora.nn.stack import edit_linears, flatten_leaves, nest
from jaxlora.select import is_stacked
from jaxlora.weights.base import AbstractWeight
from jaxlora.weights.dense import Dense
from jaxlora.weights.int4 import Int4
from jaxlora.weights.nf4 import NF4

FORMATS = {"int4": Int4, "nf4": NF4}


def random_model(raw: Mapping[str, Any], weights: str, *, max_seq_length: int) -> tuple[Any, Any, Any]:
    """(model, its spec, its config) in bf16; ``weights`` is "int4", "nf4" or "bf16". Every layer gets the same draw."""
    spec = registry.get(raw["model_type"])
    config = spec.lengthen(spec.read(raw), max_seq_length)
    model = spec.build(config, dtype=jnp.bfloat16)

    def choose(path: str, linear: Linear) -> None:
        if linear.weight is not None and not set(path.split(".")) & set(KEPT):
            linear.weight.set_value(FORMATS[weights].abstract(linear.features, jnp.bfloat16))

    if weights in FORMATS:
        edit_linears(model, choose)
    leaves = flatten_leaves(nnx.to_pure_dict(nnx.state(model)))
    # As one program a leaf: what lay beside a large leaf would leave a hole into which a smaller one goes, and its rest is counted as used.
    filled = {path: jax.jit(functools.partial(_fill, path, leaf))(jax.random.key(i)) for i, (path, leaf) in enumerate(leaves.items())}
    nnx.update(model, nest(filled))
    return model, spec, config


def _fill(path: str, leaf: Any, key: Any) -> Any:
    """The leaf with values: matrices N(0, 0.02²), norm weights 1, biases 0."""
    if isinstance(leaf, AbstractWeight) and not isinstance(leaf, Dense):
        one = type(leaf).quantise(0.02 * jax.random.normal(key, leaf.shape, jnp.bfloat16))
        return jax.tree.map(lambda like, value: jnp.broadcast_to(value, like.shape).copy(), leaf, one)
    (like,) = jax.tree.leaves(leaf)
    layer = like.shape[1:] if is_stacked(path) else like.shape
    if len(layer) > 1:
        value = 0.02 * jax.random.normal(key, layer, jnp.bfloat16)
    else:
        value = jnp.zeros(layer) if path.endswith("bias") else jnp.ones(layer)
    array = jnp.broadcast_to(value.astype(like.dtype), like.shape).copy()
    return Dense(array) if isinstance(leaf, Dense) else array
