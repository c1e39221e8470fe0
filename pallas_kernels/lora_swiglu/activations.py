"""The elementwise part: act(e) ∘ g."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def product(e: Float[Array, "*N F"], g: Float[Array, "*N F"], *, activation: str) -> Float[Array, "*N F"]:
    """act(e) ∘ g; act is computed in fp32 and rounded before it multiplies, as transformers does.

    >>> product(jnp.array([0.0, 1.0]), jnp.array([2.0, 2.0]), activation="silu").round(3).tolist()
    [0.0, 1.4620000123977661]
    """
    return ACTIVATIONS[activation](e.astype(jnp.float32)).astype(e.dtype) * g
