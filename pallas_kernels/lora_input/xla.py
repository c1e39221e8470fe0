"""The function, a product and a copy."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.functions import Function


def refuses(function: Function, x: Any, rank: int) -> str | None:
    """None: it runs anywhere."""
    return None


def columns(function: Function, inputs: Sequence[Array], a: Float[Array, "R F"], padding: int | None) -> tuple[Array, Array, Array | None]:
    """As `lora_input` returns them."""
    h = function(*inputs)
    u = jax.lax.dot_general(h, a, (((1,), (1,)), ((), ())))
    return beside(h, u, padding), u, function.statistics(inputs[0])


def beside(h: Float[Array, "N F"], u: Float[Array, "N R"], padding: int | None) -> Float[Array, "N C"]:
    """[h, u, 0] with so many zeros, or h alone without any ``padding``."""
    return h if padding is None else jnp.concatenate([h, jnp.pad(u, ((0, 0), (0, padding)))], axis=1)
