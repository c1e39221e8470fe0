"""The elementwise part as one fusion, then a product for each adapter."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.adapted_sum.xla import total
from pallas_kernels.lora_swiglu.activations import product


def refuses(e: Any, ranks: tuple[int, ...]) -> str | None:
    """None: it runs anywhere."""
    return None


def gradients(
    both: tuple[Float[Array, "N F"], Float[Array, "N F"]],
    dh: Float[Array, "N F"],
    us: tuple[Array, Array],
    du: Array,
    a: Array,
    scales: Float[Array, " N"] | None,
    unadapted: Any,
    activation: str,
    padding: int | None,
) -> Any:
    """As `gated_gradients` returns them."""
    e, g = both
    if unadapted is not None:
        e, g = (total(z, s, u, b) for z, u, (s, b) in zip(both, us, unadapted, strict=True))
    h, pull = jax.vjp(functools.partial(product, activation=activation), e, g)
    de, dg = pull(with_update(dh, du, a, scales))
    wide = (de, dg) if padding is None else (jnp.pad(jnp.concatenate([de, dg], axis=1), ((0, 0), (0, padding))),)
    return *wide, *(outer(dy, u) for dy, u in zip((de, dg), us, strict=True)), outer(du, h)


def with_update(dh: Float[Array, "N F"], du: Float[Array, "N R"], a: Float[Array, "R F"], scales: Array | None) -> Float[Array, "N F"]:
    """scales ∘ dh + du @ a, added in fp32."""
    update = jax.lax.dot_general(du, a, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    scaled = dh.astype(jnp.float32) if scales is None else dh.astype(jnp.float32) * scales[:, None]
    return (scaled + update).astype(dh.dtype)


def outer(a: Float[Array, "N P"], b: Float[Array, "N Q"]) -> Float[Array, "P Q"]:
    """aᵀ @ b, accumulated and returned in fp32."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
