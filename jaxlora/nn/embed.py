"""The token embedding."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlora.typing import Array, Float, Int
from jaxlora.weights.dense import Dense


def features_at(index: Int[Array, "B S"], features: Float[Array, "P F D"]) -> Float[Array, "B S D"]:
    """Row ``index[b, s]`` of the features of b's data shard, b // (B / P), or zero where the index is -1.

    >>> features_at(jnp.array([[-1, 1, 0]]), jnp.array([[[5.0], [7.0]]])).ravel().tolist()
    [0.0, 7.0, 5.0]
    """
    rows = jax.vmap(lambda own, at: jnp.take(own, at, axis=0, mode="clip"))(features, index.reshape(features.shape[0], -1))
    return jnp.where(index[..., None] >= 0, rows.reshape(*index.shape, -1), 0)


class Embed(nnx.Module):
    """A table [V, D] whose rows are looked up, and multiplied by ``scale``; always 16- or 32-bit."""

    def __init__(self, vocab_size: int, features: int, *, scale: float | None = None, dtype: Any = jnp.bfloat16):
        self.scale = scale
        self.weight = nnx.Param(Dense.abstract((vocab_size, features), dtype))

    @property
    def table(self) -> Dense:
        """The table as a weight, for a head that is tied to it."""
        return self.weight.get_value()

    def __call__(self, ids: Int[Array, "*N"]) -> Float[Array, "*N D"]:
        """Returns row ``ids`` of the table; the scale is rounded to the table's dtype first (Gemma's √2304 is 48 in bf16)."""
        rows = jnp.take(self.table.array, ids, axis=0, mode="clip")
        return rows if self.scale is None else rows * jnp.asarray(self.scale, rows.dtype)
