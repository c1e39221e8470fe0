"""A weight stored as it multiplies."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.typing import Array, Float, UInt32
from jaxlora.weights.base import AbstractWeight, LowRank, abstract, contract_first, contract_last, outer
from pallas_kernels.packed import pair_columns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(AbstractWeight):
    """W [O, I] in a floating-point dtype.

    Where XLA knows the number ``layer`` of a layer, counted from 1, products read its weight in ``stack``, that of all layers, without a
    copy of it.

    >>> import jax.numpy as jnp
    >>> Dense(jnp.eye(2)).matmul(jnp.ones((1, 2))).tolist()
    [[1.0, 1.0]]
    """

    array: Any
    layer: Any = None
    stack: Any = None

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

    @property
    def in_place(self) -> bool:
        """Where it knows its stack."""
        return self.stack is not None

    def dequantise(self) -> Float[Array, "O I"]:
        """The weight itself."""
        return self.array

    def numbered(self, *, known: bool = False) -> "Dense":
        """Each with its layer's number, as `jaxlora.nn.scan` has those that are known."""
        if not known or self.array.ndim != 3:
            return self
        # From 1: what counts from 0 XLA makes a counter, whose elements it does not fold into the numbers that its fusions need.
        return dataclasses.replace(self, layer=jnp.asarray(np.arange(1, len(self.array) + 1, dtype=np.uint32)))

    def within(self, stack: AbstractWeight) -> "Dense":
        """With the weights of all layers."""
        assert isinstance(stack, Dense)
        return self if self.layer is None else dataclasses.replace(self, stack=stack.array)

    def matmul(self, x: Float[Array, "N I"], update: LowRank | None = None) -> Float[Array, "N O"]:
        """x @ Wᵀ (+ u @ bᵀ)."""
        alone = self.in_place and update is None
        return contract_last(x, self._in_place().astype(x.dtype)) if alone else super().matmul(x, update)

    def matmul_t(self, dy: Float[Array, "N O"], update: LowRank | None = None) -> Float[Array, "N I"]:
        """dy @ W (+ u @ a)."""
        alone = self.in_place and update is None
        return contract_first(dy, self._in_place().astype(dy.dtype)) if alone else super().matmul_t(dy, update)

    def largest(self) -> Float[Array, "*layers"]:
        """max|w|."""
        return jnp.max(jnp.abs(self.array), axis=(-2, -1)).astype(jnp.float32)

    def words(self) -> UInt32[Array, "O half"] | None:
        """Two bf16 columns a word, which are copied at twice the speed of single ones."""
        return pair_columns(self.array) if self.array.dtype == jnp.bfloat16 and self.shape[1] % 2 == 0 else None

    def packed(self) -> Float[Array, "O I"]:
        """The array."""
        return self.array

    def cotangent(self, x: Float[Array, "N I"], dy: Float[Array, "N O"]) -> "Dense":
        """dW = dyᵀ x, accumulated in fp32, in the weight's dtype. Dropped by XLA where nobody asks for it."""
        return type(self)(outer(dy, x).astype(self.array.dtype))

    def _in_place(self) -> Float[Array, "O I"]:
        """The weight as a part of its stack."""
        return jax.lax.dynamic_index_in_dim(self.stack, self.layer - 1, keepdims=False, allow_negative_indices=False)
