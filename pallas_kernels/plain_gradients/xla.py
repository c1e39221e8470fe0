"""The elementwise part as one fusion, then a product for each adapter."""

from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.adapted_sum.xla import total
from pallas_kernels.functions import Function
from pallas_kernels.gated_gradients.xla import outer, refuses, with_update

__all__ = ["gradients", "refuses"]


def gradients(
    e: Float[Array, "N F"],
    bias: Float[Array, "1 F"],
    dh: Float[Array, "N F"],
    u: Array,
    du: Array,
    update: Any,
    unadapted: Any,
    activation: str,
) -> Any:
    """As `plain_gradients` returns them."""
    if unadapted is not None:
        scales, b = unadapted
        e = total(e, scales, u, b)
    if update is not None:
        scales, a = update
        dh = with_update(dh, du, a, scales)
    h, pull = jax.vjp(lambda e: Function("plain", activation)(e, bias), e)
    (de,) = pull(dh)
    return de, outer(de, u), outer(du, h)
