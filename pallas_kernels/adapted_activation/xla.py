"""A product for each update, an elementwise part, and a product for the columns."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.functions import Function
from pallas_kernels.lora_input.xla import beside


def refuses(e: Any, ranks: tuple[int, ...]) -> str | None:
    """None: it runs anywhere."""
    return None


def made(
    products: Sequence[Array],
    scales: Sequence[Array] | None,
    updates: Sequence[tuple[Array, Array]],
    a: Float[Array, "R F"],
    bias: Array | None,
    function: Function,
    padding: int | None,
) -> tuple[Array, Array]:
    """As `adapted_activation` returns them."""
    finished = (adapted(z, s, *update) for z, s, update in zip(products, scales or [None] * len(products), updates, strict=True))
    h = function(*finished, *(() if bias is None else (bias,)))
    u = _contracted(h, a)
    return beside(h, u, padding), u


def adapted(
    z: Float[Array, "N F"], scales: Float[Array, " N"] | None, u: Float[Array, "N R"], b: Float[Array, "F R"]
) -> Float[Array, "N F"]:
    """scales_i · z_i + u_i bᵀ, added in fp32 and rounded once."""
    y = z.astype(jnp.float32) if scales is None else z.astype(jnp.float32) * scales[:, None]
    return (y + _contracted(u, b)).astype(z.dtype)


def _contracted(x: Float[Array, "N P"], y: Float[Array, "Q P"]) -> Float[Array, "N Q"]:
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())))
