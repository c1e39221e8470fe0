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
    e: Array, g: Array, e_scales: Array, g_scales: Array, u_gate: Array, u_up: Array, b_gate: Array, b_up: Array, a: Array, activation: str
) -> tuple[Array, Array, Array, Array]:
    """As `adapted_gated` returns them."""
    wide_e, wide_g = _scaled(e, e_scales, _contracted(u_gate, b_gate)), _scaled(g, g_scales, _contracted(u_up, b_up))
    h = product(wide_e, wide_g, activation=activation)
    return wide_e, wide_g, h, _contracted(h, a)


def _contracted(x: Float[Array, "N P"], y: Float[Array, "Q P"]) -> Float[Array, "N Q"]:
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())))


def _scaled(x: Float[Array, "N F"], scales: Float[Array, " N"], added: Float[Array, "N F"]) -> Float[Array, "N F"]:
    """scales_i · x_i + added, rounded once."""
    return (x.astype(jnp.float32) * scales[:, None] + added).astype(x.dtype)
