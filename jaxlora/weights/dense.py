"""A weight stored as it multiplies."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.typing import Array, Float
from jaxlora.weights.base import AbstractWeight, abstract, outer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(AbstractWeight):
    """W [O, I] in a floating-point dtype.

    >>> import jax.numpy as jnp
    >>> Dense(jnp.eye(2)).matmul(jnp.ones((1, 2))).tolist()
    [[1.0, 1.0]]
    """

    array: Any

    @classmethod
    def abstract(cls, shape: tuple[int, int], dtype: Any) -> "Dense":
        """A Dense of that shape whose array is yet to be loaded."""
        return cls(abstract(shape, dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """The logical (out, in)."""
        return tuple(self.array.shape[-2:])

    @property
    def trainable(self) -> bool:
        """A dense weight can be trained."""
        return True

    def dequantise(self) -> Float[Array, "O I"]:
        """The weight itself."""
        return self.array

    def largest(self) -> Float[Array, "*layers"]:
        """max|w|."""
        return jnp.max(jnp.abs(self.array), axis=(-2, -1)).astype(jnp.float32)

    def packed(self) -> Float[Array, "O I"]:
        """The array."""
        return self.array

    def cotangent(self, x: Float[Array, "N I"], dy: Float[Array, "N O"]) -> "Dense":
        """dW = dyᵀ x, accumulated in fp32, in the weight's dtype. Dropped by XLA where nobody asks for it."""
        return type(self)(outer(dy, x).astype(self.array.dtype))
