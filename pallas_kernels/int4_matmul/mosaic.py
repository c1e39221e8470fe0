"""Products with an int4 weight in Mosaic GPU, sm90; the device code is `mosaic_code` and `mosaic_gradient`."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _tuned, mosaic_code, mosaic_gradient
from pallas_kernels.packed import GROUP, Packed


def refuses(x: Array, weight: Packed, update: Any, transpose: bool) -> str | None:
    """Why Mosaic cannot run this call here, or None."""
    if update is not None and update[0].shape[1] > GROUP:
        return f"adds updates of up to {GROUP} columns, got {update[0].shape[1]}"
    wrong = mosaic_code.refuses(x, (weight,))
    return wrong or (mosaic_gradient if transpose else mosaic_code).refuses_shape(weight)


def product(x: Float[Array, "N _"], weight: Packed, update: Any, transpose: bool) -> Float[Array, "N _"]:
    """x Wᵀ or x W, plus the update."""
    if transpose:
        config = _tuned.config("int4_matmul", "mosaic_transposed", mosaic_gradient.Config, (*x.shape, weight.shape[1]))
        return mosaic_gradient.product(x, weight, update, config)
    config = _tuned.config("int4_matmul", "mosaic", mosaic_code.Config, (*x.shape, weight.shape[0]))
    low_rank = None if update is None else (update[0], (update[1],))
    (y,) = mosaic_code.products(x, (weight,), low_rank, lambda acc: (acc.astype(jnp.bfloat16),), 1, config)
    return y
