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


def columns(function: Function, inputs: Sequence[Array], a: Float[Array, "R F"]) -> tuple[Array, Array, Array | None]:
    """As `lora_input` returns them."""
    h = function(*inputs)
    u = jax.lax.dot_general(h, a, (((1,), (1,)), ((), ())))
    return jnp.concatenate([h, u], axis=1), u, function.statistics(inputs[0])
