"""What every storage format of a Linear's weight can do."""

import abc
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.typing import Array, Float

type LowRank = tuple[Array, Array]


class AbstractWeight(abc.ABC):
    """A weight [O, I] in some storage format; a pytree of arrays with static metadata. Subclasses are final.

    Invariants: ``w.matmul(x) == x @ w.dequantise().T`` and ``w.matmul_t(dy) == dy @ w.dequantise()``, up to the rounding of the product.
    A leaf whose arrays carry one more leading axis is a stack of weights; it is sliced before it multiplies.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """The logical (out, in), whatever is stored."""

    @property
    @abc.abstractmethod
    def trainable(self) -> bool:
        """Whether a gradient with respect to the stored arrays exists."""

    @abc.abstractmethod
    def dequantise(self) -> Float[Array, "O I"]:
        """The weight as one array in the dtype that the format decodes to."""

    @abc.abstractmethod
    def cotangent(self, x: Float[Array, "N I"], dy: Float[Array, "N O"]) -> "AbstractWeight | None":
        """The gradient of ``sum(dy * matmul(x))`` as a leaf of the same structure; None where ``trainable`` is False."""

    def matmul(self, x: Float[Array, "N I"], update: LowRank | None = None) -> Float[Array, "N O"]:
        """x @ Wᵀ, plus u @ bᵀ where an update (u [N, R], b [O, R]) is given; in x's dtype. A format may fuse the two."""
        w = self.dequantise().astype(x.dtype)
        if update is None:
            return contract_last(x, w)
        u, b = update
        if _one_product(x, u) and w.shape[0] > w.shape[1]:
            return contract_last(jnp.concatenate([x, u], axis=1), jnp.concatenate([w, b], axis=1))
        return contract_last(x, w) + contract_last(u, b)

    def matmul_t(self, dy: Float[Array, "N O"], update: LowRank | None = None) -> Float[Array, "N I"]:
        """dy @ W, plus u @ a where an update (u [N, R], a [R, I]) is given; in dy's dtype. This is the input's gradient."""
        # Without the barrier XLA decodes the weight again in every tile of the product.
        w = jax.lax.optimization_barrier(self.dequantise().astype(dy.dtype))
        if update is None:
            return contract_first(dy, w)
        u, a = update
        if _one_product(dy, u) and w.shape[1] > w.shape[0]:
            return contract_first(jnp.concatenate([dy, u], axis=1), jnp.concatenate([w, a], axis=0))
        return contract_first(dy, w) + contract_first(u, a)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays, stacked axis included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def contract_last(x: Float[Array, "N I"], w: Float[Array, "O I"]) -> Float[Array, "N O"]:
    """x @ wᵀ: both operands contracted on their last axis."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def contract_first(dy: Float[Array, "N O"], w: Float[Array, "O I"]) -> Float[Array, "N I"]:
    """dy @ w."""
    return jax.lax.dot_general(dy, w, (((1,), (0,)), ((), ())))


def outer(dy: Float[Array, "N O"], x: Float[Array, "N I"]) -> Float[Array, "O I"]:
    """dyᵀ @ x, accumulated and returned in fp32."""
    return jax.lax.dot_general(dy, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def interleave(even: Float[Array, "O half"], odd: Float[Array, "O half"], dtype: Any) -> Float[Array, "O I"]:
    """Columns even[:, 0], odd[:, 0], even[:, 1], …, rounded to ``dtype``.

    A bf16 pair is written as one 32-bit word: a kernel that writes single 16-bit columns reaches half the memory bandwidth (H200: 1.9
    against 3.4 TB/s). The barrier keeps XLA from going back to single columns.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return jnp.stack([even, odd], axis=-1).reshape(even.shape[0], -1).astype(dtype)
    low, high = (jax.lax.bitcast_convert_type(half.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32) for half in (even, odd))
    words = jax.lax.optimization_barrier(low | (high << 16))
    return jax.lax.bitcast_convert_type(words, jnp.bfloat16).reshape(even.shape[0], -1)


def repeat_each(x: Float[Array, "*rows N"], times: int) -> Float[Array, "*rows M"]:
    """Each element of the last axis ``times`` times: a broadcast, where jnp.repeat may build and fold an index array for seconds."""
    return jnp.broadcast_to(x[..., None], (*x.shape, times)).reshape(*x.shape[:-1], x.shape[-1] * times)


def _one_product(x: Float[Array, "N I"], u: Float[Array, "N R"]) -> bool:
    """Whether x and u are contracted together: on a GPU, copying a narrow x costs less than writing and reading a wide update.

    Not on a CPU, where it only changes the order of the sum, nor at ranks that leave no aligned rows.
    """
    return jax.default_backend() == "gpu" and u.shape[1] % 16 == 0 and x.shape[1] % 16 == 0


def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array that is yet to be loaded."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
