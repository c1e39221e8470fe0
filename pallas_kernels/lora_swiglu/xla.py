"""Two products, then the elementwise part; XLA fuses what it can."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.lora_swiglu.activations import product
from pallas_kernels.packed import Weight, decode


def refuses(x: Array, gate: Weight, up: Weight, ranks: int, activation: str) -> str | None:
    """None: it runs anywhere."""
    return None


def gated(
    x: Float[Array, "N I"], gate: Weight, up: Weight, update: Any, activation: str
) -> tuple[Float[Array, "N F"], Float[Array, "N F"], Float[Array, "N F"]]:
    """(h, e, g)."""
    weights = [decode(w, x.dtype) for w in (gate, up)]
    if update is not None:
        u, *bs = update
        x, weights = jnp.concatenate([x, u], axis=1), [jnp.concatenate([w, b], axis=1) for w, b in zip(weights, bs, strict=True)]
    e, g = (jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))) for w in weights)
    return product(e, g, activation=activation), e, g
