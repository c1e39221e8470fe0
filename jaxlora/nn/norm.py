"""Normalisation layers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlora.typing import Array, Float
from jaxlora.weights.base import abstract


class RMSNorm(nnx.Module):
    """y = w · (x / rms(x)): normalised in fp32, cast to x's dtype, then scaled (the Llama family's order)."""

    def __init__(self, features: int, *, eps: float, dtype: Any = jnp.bfloat16):
        self.weight = nnx.Param(abstract((features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Normalises the last axis."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * _row(self.weight, x)


class LayerNorm(nnx.Module):
    """y = w · (x - mean) / std + b, in fp32, cast to x's dtype."""

    def __init__(self, features: int, *, eps: float, dtype: Any = jnp.bfloat16):
        self.weight = nnx.Param(abstract((features,), dtype))
        self.bias = nnx.Param(abstract((features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Normalises the last axis."""
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        return (normed * _row(self.weight, x32) + _row(self.bias, x32)).astype(x.dtype)


def _row(param: nnx.Param[Any], like: Array) -> Array:
    """The parameter in ``like``'s dtype, with as many axes."""
    value = param.get_value().astype(like.dtype)
    return value.reshape((1,) * (like.ndim - 1) + value.shape)
