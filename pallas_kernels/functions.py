"""What makes the input of Linears: a norm, an activation, or an activation times another product; row by row."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.lora_swiglu.activations import product


def quick_gelu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """x · sigmoid(1.702 x), in fp32 and rounded once (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    >>> quick_gelu(jnp.array([0.0, 1.0])).round(3).tolist()
    [0.0, 0.8460000157356262]
    """
    x32 = x.astype(jnp.float32)
    return (x32 * jax.nn.sigmoid(1.702 * x32)).astype(x.dtype)


def gelu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """x · Φ(x) with the normal distribution's exact Φ, in fp32 and rounded once.

    >>> gelu(jnp.array([0.0, 1.0])).round(3).tolist()
    [0.0, 0.8410000205039978]
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def gelu_tanh(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """gelu by x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), in fp32 and rounded once (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    >>> gelu_tanh(jnp.array([0.0, 1.0])).round(4).tolist()
    [0.0, 0.8411999940872192]
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def _inverse_rms(eps: float, x32: Float[Array, "*N D"]) -> Float[Array, "*N 1"]:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)


PLAIN = {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rms_norm(eps: float, x: Float[Array, "*N D"], weight: Float[Array, "*ones D"]) -> Float[Array, "*N D"]:
    """weight · x / rms(x): the quotient is rounded to the weight's dtype, the product to x's.

    >>> rms_norm(0.0, jnp.array([[3.0, -3.0]]), jnp.ones((1, 2))).tolist()
    [[1.0, -1.0]]
    """
    return _rms_norm_fwd(eps, x, weight)[0]


@functools.partial(jax.jit, static_argnums=0)
def _rms_norm_fwd(eps: float, x: Array, weight: Array) -> tuple[Array, Any]:
    x32 = x.astype(jnp.float32)
    inverse = _inverse_rms(eps, x32)
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


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer_norm(eps: float, x: Float[Array, "*N D"], weight: Float[Array, "*ones D"], bias: Float[Array, "*ones D"]) -> Float[Array, "*N D"]:
    """weight · (x - mean) / std + bias, in fp32, cast to x's dtype.

    >>> layer_norm(0.0, jnp.array([[1.0, 3.0]]), jnp.ones((1, 2)), jnp.zeros((1, 2))).tolist()
    [[-1.0, 1.0]]
    """
    return _layer_norm_fwd(eps, x, weight, bias)[0]


@functools.partial(jax.jit, static_argnums=0)
def _layer_norm_fwd(eps: float, x: Array, weight: Array, bias: Array) -> tuple[Array, Any]:
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    centred = x32 - mean
    inverse = _inverse_rms(eps, centred)
    y = centred * inverse * weight.astype(jnp.float32) + bias.astype(jnp.float32)
    return y.astype(x.dtype), (x, weight, bias, mean, inverse)


@functools.partial(jax.jit, static_argnums=0)
def _layer_norm_bwd(eps: float, residuals: Any, dy: Array) -> tuple[Array, Array, Array]:
    """With n = (x - mean) / std and g = w·dy: dx = (g - mean(g) - n·mean(g·n)) / std, dw = Σ dy·n and db = Σ dy over the rows."""
    x, weight, bias, mean, inverse = residuals
    centred, dy32, rows = x.astype(jnp.float32) - mean, dy.astype(jnp.float32), tuple(range(x.ndim - 1))
    g = dy32 * weight.astype(jnp.float32)
    # Both sums are one pass over x and dy.
    shift, along = jnp.mean(g, axis=-1, keepdims=True), jnp.mean(g * centred, axis=-1, keepdims=True)
    dx = inverse * (g - shift - centred * (jnp.square(inverse) * along))
    dweight = jnp.sum(dy32 * (centred * inverse), axis=rows).reshape(weight.shape).astype(weight.dtype)
    return dx.astype(x.dtype), dweight, jnp.sum(dy32, axis=rows).reshape(bias.shape).astype(bias.dtype)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of rows: "rms_norm" (x, weight), "layer_norm" (x, weight, bias), "plain" act(e + bias), "gated" act(e) ∘ g.

    x, e and g are [N, F], weights and biases [1, F]. It is a value, not a closure: what is compiled is found again by it.

    >>> Function("plain", "quick_gelu")(jnp.zeros((1, 1)), jnp.ones((1, 1))).round(3).tolist()
    [[0.8460000157356262]]
    """

    form: Literal["rms_norm", "layer_norm", "plain", "gated"]
    activation: str = ""
    eps: float = 0.0

    @property
    def inputs(self) -> tuple[int, int]:
        """How many of its inputs are [N, F], and how many [1, F]."""
        return {"rms_norm": (1, 1), "layer_norm": (1, 2), "plain": (1, 1), "gated": (2, 0)}[self.form]

    def statistics(self, x: Float[Array, "N F"]) -> Float[Array, "N S"] | None:
        """What a norm computes of each row, in fp32: 1 / rms, or 1 / std and the mean. None of an activation."""
        x32 = x.astype(jnp.float32)
        match self.form:
            case "rms_norm":
                return _inverse_rms(self.eps, x32)
            case "layer_norm":
                mean = jnp.mean(x32, axis=1, keepdims=True)
                return jnp.concatenate([_inverse_rms(self.eps, x32 - mean), mean], axis=1)
            case _:
                return None

    def sum_over_rows(self, du: Float[Array, "N R"], inputs: Sequence[Array], statistics: Float[Array, "N S"]) -> Float[Array, "R F"]:
        """duᵀ · norm(*inputs) in fp32, of a norm whose `statistics` are known; the norm itself is not made.

        With v = du / rms(x) that is w ∘ (vᵀ x); of a layer norm, where v = du / std(x), it is w ∘ (vᵀ x - Σ v · mean(x)) + Σ du · b.

        >>> x, one = jnp.array([[3.0, -3.0]]), jnp.ones((1, 2))
        >>> norm = Function("rms_norm")
        >>> norm.sum_over_rows(jnp.ones((1, 1)), (x, one), norm.statistics(x)).tolist()
        [[1.0, -1.0]]
        """
        x, weight, *bias = inputs
        inverse, *mean = jnp.split(statistics, statistics.shape[1], axis=1)
        scaled = (du.astype(jnp.float32) * inverse).astype(x.dtype)
        total = jax.lax.dot_general(scaled, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        if mean:
            total -= jnp.sum(scaled.astype(jnp.float32) * mean[0], axis=0)[:, None]
        total *= weight.astype(jnp.float32)
        return total + jnp.sum(du.astype(jnp.float32), axis=0)[:, None] * bias[0].astype(jnp.float32) if bias else total

    def __call__(self, *inputs: Array) -> Array:
        """Computes it."""
        match self.form:
            case "rms_norm":
                return rms_norm(self.eps, *inputs)
            case "layer_norm":
                return layer_norm(self.eps, *inputs)
            case "plain":
                e, bias = inputs
                return PLAIN[self.activation](e + bias.astype(e.dtype))
            case "gated":
                return product(*inputs, activation=self.activation)
