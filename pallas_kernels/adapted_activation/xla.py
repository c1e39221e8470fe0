"""A product for each update, an elementwise part, and a product for the columns."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.adapted_sum.xla import total
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
    finished = (total(z, s, *update) for z, s, update in zip(products, scales or [None] * len(products), updates, strict=True))
    h = function(*finished, *(() if bias is None else (bias,)))
    u = jax.lax.dot_general(h, a, (((1,), (1,)), ((), ())))
    return beside(h, u, padding), u
