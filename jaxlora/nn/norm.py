"""Normalisation layers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlora.typing import Array, Float
from jaxlora.weights.base import abstract


class RMSNorm(nnx.Module):
    """y = w · (x / rms(x)): normalised in fp32, cast to x's dtype, then scaled (the Llama family's order)."""

    def __init__(self, features: int, *, eps: float, dtype: Any = jnp.bfloat16):
        self.weight = nnx.Param(abstract((features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Normalises the last axis."""
        return _rms_norm(self.eps, x, _row(self.weight, x))


class CentredRMSNorm(nnx.Module):
    """y = (1 + w) · x / rms(x): all of it in fp32, then cast to x's dtype (Gemma's order; its weights are stored around 0)."""

    def __init__(self, features: int, *, eps: float, dtype: Any = jnp.bfloat16):
        self.weight = nnx.Param(abstract((features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Normalises the last axis."""
        return _rms_norm(self.eps, x, 1.0 + _row(self.weight, x.astype(jnp.float32)))


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(eps: float, x: Float[Array, "*N D"], weight: Float[Array, "*ones D"]) -> Float[Array, "*N D"]:
    """weight · x / rms(x): the quotient is rounded to the weight's dtype, the product to x's."""
    return _rms_norm_fwd(eps, x, weight)[0]


@functools.partial(jax.jit, static_argnums=0)
def _rms_norm_fwd(eps: float, x: Array, weight: Array) -> tuple[Array, Any]:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return ((x32 * inverse).astype(weight.dtype) * weight).astype(x.dtype), (x, weight, inverse)


@functools.partial(jax.jit, static_argnums=0)
def _rms_norm_bwd(eps: float, residuals: Any, dy: Array) -> tuple[Array, Array]:
    """With n = x / rms and g = w·dy: dx = (g - n·mean(g·n)) / rms, dw = Σ dy·n over the rows."""
    x, weight, inverse = residuals
    x32 = x.astype(jnp.float32)
    normed = x32 * inverse
    g = (dy.astype(weight.dtype) * weight).astype(jnp.float32)
    # Without 1 / rms inside, the sum does not wait for it: both are one pass over x.
    along = inverse * jnp.mean(g * x32, axis=-1, keepdims=True)
    dx = inverse * (g - normed * along)
    dweight = jnp.sum(dy.astype(jnp.float32) * normed.astype(weight.dtype).astype(jnp.float32), axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), dweight.astype(weight.dtype).reshape(weight.shape)


_rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


def residual(x: Float[Array, "*N D"], added: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """x + added in the middle of a block, for the policies that keep it: what was added is then not needed again."""
    return checkpoint_name(x + added, "residual")


def _row(param: nnx.Param[Any], like: Array) -> Array:
    """The parameter in ``like``'s dtype, with as many axes."""
    value = param.get_value().astype(like.dtype)
    return value.reshape((1,) * (like.ndim - 1) + value.shape)
