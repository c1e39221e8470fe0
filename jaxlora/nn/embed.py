"""The token embedding."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxlora.typing import Array, Float, Int
from jaxlora.weights.dense import Dense


class Embed(nnx.Module):
    """A table [V, D] whose rows are looked up; always 16- or 32-bit."""

    def __init__(self, vocab_size: int, features: int, *, dtype: Any = jnp.bfloat16):
        self.weight = nnx.Param(Dense.abstract((vocab_size, features), dtype))

    @property
    def table(self) -> Dense:
        """The table as a weight, for a head that is tied to it."""
        return self.weight.get_value()

    def __call__(self, ids: Int[Array, "*N"]) -> Float[Array, "*N D"]:
        """Returns row ``ids`` of the table."""
        return jnp.take(self.table.array, ids, axis=0, mode="clip")
