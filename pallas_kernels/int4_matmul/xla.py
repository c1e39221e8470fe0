"""Decode the weight, then one cuBLAS product."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.packed import Packed, decode


def refuses(x: Array, weight: Packed, update: Any, transpose: bool) -> str | None:
    """None: it runs anywhere."""
    return None


def product(x: Float[Array, "N _"], weight: Packed, update: Any, transpose: bool) -> Float[Array, "N _"]:
    """One product of [x, u] with the decoded weight beside b."""
    w = decode(weight, x.dtype)
    axis = 0 if transpose else 1
    if update is not None:
        u, b = update
        x, w = jnp.concatenate([x, u], axis=1), jnp.concatenate([w, b.T if transpose else b], axis=axis)
    return jax.lax.dot_general(x, w, (((1,), (axis,)), ((), ())))
