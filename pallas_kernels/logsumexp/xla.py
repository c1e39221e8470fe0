"""One reduction of pairs."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def refuses() -> str | None:
    """None: it runs anywhere."""
    return None


def logsumexp(t: Float[Array, "N V"]) -> Float[Array, " N"]:
    """As `logsumexp` returns it."""

    def join(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        largest = jnp.maximum(a[0], b[0])
        return largest, a[1] * jnp.exp(a[0] - largest) + b[1] * jnp.exp(b[0] - largest)

    # Finite: the difference of two infinities is no number.
    nothing = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
    largest, total = lax.reduce((t, jnp.ones_like(t)), nothing, join, (1,))
    return largest + jnp.log(total)
