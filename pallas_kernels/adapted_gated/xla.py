"""A product for each update, an elementwise part, and a product for the columns."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.lora_swiglu.activations import product


def refuses(e: Any, ranks: tuple[int, ...]) -> str | None:
    """None: it runs anywhere."""
    return None


def made(
    products: tuple[Array, Array], scales: tuple[Array, Array], us: tuple[Array, Array], bs: tuple[Array, Array], a: Array, activation: str
) -> tuple[Array, Array, Array, Array]:
    """As `adapted_gated` returns them."""
    e, g = (_scaled(z, s, _contracted(u, b)) for z, s, u, b in zip(products, scales, us, bs, strict=True))
    h = product(e, g, activation=activation)
    return e, g, h, _contracted(h, a)


def _contracted(x: Float[Array, "N P"], y: Float[Array, "Q P"]) -> Float[Array, "N Q"]:
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())))


def _scaled(x: Float[Array, "N F"], scales: Float[Array, " N"], added: Float[Array, "N F"]) -> Float[Array, "N F"]:
    """scales_i · x_i + added, rounded once."""
    return (x.astype(jnp.float32) * scales[:, None] + added).astype(x.dtype)
