"""The codes turned around, then decoded."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.float8_rows import E4M3
from pallas_kernels.packed import GROUP, Packed


def refuses(weights: Sequence[Packed]) -> str | None:
    """None: it runs anywhere."""
    return None


def transposed(weights: Sequence[Packed], scale: Float[Array, ""]) -> Float[Array, "columns O"]:
    """As `float8_transposed` returns it."""
    return jnp.concatenate([_turned(weight.alone(), scale) for weight in weights], axis=1)


def _turned(weight: Packed, scale: Float[Array, ""]) -> Float[Array, "columns O"]:
    scales, shifts = weight.scales_over(scale), jnp.array([0, 4], jnp.uint8)
    out, groups = scales.shape
    # Turned around as codes, a copy of its own; all that is written from them is then contiguous.
    codes = jax.lax.optimization_barrier(weight.codes.T)
    values = weight.values(codes[:, None] >> shifts[None, :, None]).reshape(groups, GROUP, out)
    return (values * scales.T[:, None]).astype(E4M3).reshape(-1, out)
