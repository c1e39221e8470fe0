"""Normalisation layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlora.nn.linear import Linear, pends
from jaxlora.nn.pending import Pending, fork
from jaxlora.typing import Array, Float, PRNGKeyArray
from jaxlora.weights.base import abstract
from pallas_kernels.functions import Function

# What computes a norm, and of what.
type Definition = tuple[Function, tuple[Array, ...]]


class RMSNorm(nnx.Module):
    """y = w · (x / rms(x)): normalised in fp32, cast to x's dtype, then scaled (the Llama family's order)."""

    def __init__(self, features: int, *, eps: float, dtype: Any = jnp.bfloat16):
        self.weight = nnx.Param(abstract((features,), dtype))
        self.eps = eps

    def definition(self, x: Float[Array, "*N D"]) -> Definition:
        """As a kernel takes it."""
        return Function("rms_norm", eps=self.eps), (x, _row(self.weight, x))

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Normalises the last axis."""
        function, inputs = self.definition(x)
        return function(*inputs)


class CentredRMSNorm(nnx.Module):
    """y = (1 + w) · x / rms(x): all of it in fp32, then cast to x's dtype (Gemma's order; its weights are stored around 0)."""

    def __init__(self, features: int, *, eps: float, dtype: Any = jnp.bfloat16):
        self.weight = nnx.Param(abstract((features,), dtype))
        self.eps = eps

    def definition(self, x: Float[Array, "*N D"]) -> Definition:
        """As a kernel takes it."""
        return Function("rms_norm", eps=self.eps), (x, 1.0 + _row(self.weight, x.astype(jnp.float32)))

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Normalises the last axis."""
        function, inputs = self.definition(x)
        return function(*inputs)


class LayerNorm(nnx.Module):
    """y = w · (x - mean) / std + b, in fp32, cast to x's dtype."""

    def __init__(self, features: int, *, eps: float, dtype: Any = jnp.bfloat16):
        self.weight = nnx.Param(abstract((features,), dtype))
        self.bias = nnx.Param(abstract((features,), dtype))
        self.eps = eps

    def definition(self, x: Float[Array, "*N D"]) -> Definition:
        """As a kernel takes it."""
        return Function("layer_norm", eps=self.eps), (x, _row(self.weight, x), _row(self.bias, x))

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Normalises the last axis."""
        function, inputs = self.definition(x)
        return function(*inputs)


def branch(
    norm: RMSNorm | CentredRMSNorm | LayerNorm,
    x: Float[Array, "*N D"],
    linears: Sequence[Linear],
    keys: Mapping[str, PRNGKeyArray] | None,
) -> tuple[Float[Array, "*N D"], Float[Array, "*N D"] | Pending]:
    """(x, norm(x)), where a residual block begins whose ``linears`` alone take the norm; x goes on past it.

    Where kernels run, the norm is pending: the Linears make it with their adapters' columns beside it, and its backward is one pass with
    the gradient that comes past it. ``keys`` are the layer's for dropout.
    """
    function, inputs = norm.definition(x)
    return fork(function, inputs) if pends(function, inputs, linears, keys) else (x, function(*inputs))


def residual(x: Float[Array, "*N D"], added: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """x + added in the middle of a block, for the policies that keep it: what was added is then not needed again."""
    return checkpoint_name(add(x, added), "residual")


def add(x: Float[Array, "*N D"], added: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """x + added. As rows, which is how products make them: a product that XLA turns to another shape adds to a copy of x."""
    width = x.shape[-1]
    return (x.reshape(-1, width) + added.reshape(-1, width)).reshape(x.shape)


def _row(param: nnx.Param[Any], like: Array) -> Array:
    """The parameter in ``like``'s dtype, with as many axes."""
    value = param.get_value().astype(like.dtype)
    return value.reshape((1,) * (like.ndim - 1) + value.shape)
