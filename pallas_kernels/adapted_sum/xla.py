"""A product, then an elementwise part."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def refuses(z: Any, rank: int) -> str | None:
    """None: it runs anywhere."""
    return None


def total(z: Float[Array, "N C"], scales: Float[Array, " N"] | None, u: Float[Array, "N R"], b: Float[Array, "F R"]) -> Float[Array, "N F"]:
    """As `adapted_sum` returns it."""
    y = z[:, : len(b)].astype(jnp.float32) * (1.0 if scales is None else scales[:, None])
    return (y + jax.lax.dot_general(u, b, (((1,), (1,)), ((), ())))).astype(z.dtype)
