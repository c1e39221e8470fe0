"""A norm that the Linears which take it make themselves, and whose backward is one pass with what comes past it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.typing import Array, Float
from pallas_kernels.functions import Function
from pallas_kernels.norm_gradient import norm_gradient


@dataclasses.dataclass(frozen=True)
class Pending:
    """norm(x) = function(*inputs), not computed yet.

    The value's gradient goes to ``hollow``, zeros [N, D] that nobody reads, and ``fork`` turns it into the gradient of x.
    """

    function: Function
    inputs: tuple[Array, ...]
    hollow: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The value's."""
        return self.inputs[0].shape

    def value(self) -> Array:
        """Computed apart."""
        return _value(self.function, self.inputs, self.hollow)


def fork(function: Function, inputs: Sequence[Array]) -> tuple[Float[Array, "*N D"], Pending]:
    """(x, its norm), for a residual block: x goes on past the norm.

    >>> x, one = jnp.array([[1.0, -1.0]]), jnp.ones((1, 2))
    >>> def f(x):
    ...     past, normed = fork(Function("rms_norm"), (x, one))
    ...     return (5 * past + normed.value()).sum()
    >>> f(x).item(), jax.grad(f)(x).tolist()
    (0.0, [[6.0, 6.0]])
    """
    x, hollow = _fork(function, tuple(inputs))
    return x, Pending(function, jax.lax.stop_gradient(tuple(inputs)), hollow)


def _fork_forward(function: Function, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    x = inputs[0]
    return x, jnp.zeros((x.size // x.shape[-1], x.shape[-1]), x.dtype)


_fork = jax.custom_vjp(_fork_forward, nondiff_argnums=(0,))


def _fork_fwd(function: Function, inputs: tuple[Array, ...]) -> tuple[tuple[Array, Array], Any]:
    return _fork_forward(function, inputs), inputs


@functools.partial(jax.jit, static_argnums=0)
def _fork_bwd(function: Function, inputs: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Any]:
    x, *rows = (v.reshape(-1, v.shape[-1]) for v in inputs)
    past, dy = (cotangent.reshape(x.shape) for cotangent in cotangents)
    dx = norm_gradient((x, *rows), dy, past, function=function)
    # Only where a norm is trained is its weight's gradient computed.
    _, pull = jax.vjp(lambda *rows: function(x, *rows), *rows)
    return (tuple(gradient.reshape(v.shape) for gradient, v in zip((dx, *pull(dy)), inputs, strict=True)),)


_fork.defvjp(_fork_fwd, _fork_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _value(function: Function, inputs: tuple[Array, ...], hollow: Array) -> Array:
    return function(*inputs)


def _value_fwd(function: Function, inputs: tuple[Array, ...], hollow: Array) -> tuple[Array, None]:
    return function(*inputs), None


def _value_bwd(function: Function, _: None, dy: Array) -> tuple[None, Array]:
    return None, dy.reshape(-1, dy.shape[-1])


_value.defvjp(_value_fwd, _value_bwd)
