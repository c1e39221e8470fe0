"""A norm that the Linears which take it make themselves, and whose backward is one pass with what comes past it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.typing import Array, Float
from jaxlora.weights.base import scale_rows
from pallas_kernels.functions import Function
from pallas_kernels.norm_gradient import norm_gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hollow:
    """Zeros that nobody reads, whose cotangent is a gradient as products leave it.

    Of the cotangent's ``columns`` [N, C] the first count, as many as x has; the others are what products made beside them for their
    adapters. The gradient is scales ∘ columns + added, where products come with ``scales`` of their rows, fp32 [N], or their adapters'
    part is ``added`` afterwards, [N, D]; what there is not is None.
    """

    columns: Any
    scales: Any
    added: Any

    @classmethod
    def of(cls, x: Float[Array, "*N D"], spare: int, *, scaled: bool) -> "Hollow":
        """For a gradient by x with so many more columns, or whose rows are ``scaled``: either way something is added."""
        rows, width = x.size // x.shape[-1], x.shape[-1]
        columns = jnp.zeros((rows, width + spare), x.dtype)
        added = jnp.zeros((rows, width), x.dtype) if spare or scaled else None
        return cls(columns, jnp.zeros(rows, jnp.float32) if scaled else None, added)

    def whole(self, width: int) -> Float[Array, "N D"]:
        """The gradient [N, width] in one array."""
        return scale_rows(self.columns[:, :width], self.scales, self.added)


@dataclasses.dataclass(frozen=True)
class Pending:
    """norm(x) = function(*inputs), not computed yet.

    The value's gradient goes to ``hollow``, which ``fork`` turns into the gradient of x.
    """

    function: Function
    inputs: tuple[Array, ...]
    hollow: Hollow

    @property
    def shape(self) -> tuple[int, ...]:
        """The value's."""
        return self.inputs[0].shape

    def value(self) -> Array:
        """Computed apart."""
        return _value(self.function, self.inputs, self.hollow)


def fork(function: Function, inputs: Sequence[Array], spare: int, *, scaled: bool = False) -> tuple[Float[Array, "*N D"], Pending]:
    """(x, its norm), for a residual block: x goes on past the norm; ``spare`` are the columns that ``hollow`` has beyond those of x.

    ``scaled``: the norm's gradient comes with scales of its rows.

    >>> x, one = jnp.array([[1.0, -1.0]]), jnp.ones((1, 2))
    >>> def f(x):
    ...     past, normed = fork(Function("rms_norm"), (x, one), 0)
    ...     return (5 * past + normed.value()).sum()
    >>> f(x).item(), jax.grad(f)(x).tolist()
    (0.0, [[6.0, 6.0]])
    """
    x, hollow = _fork(function, (spare, scaled), tuple(inputs))
    return x, Pending(function, jax.lax.stop_gradient(tuple(inputs)), hollow)


def _fork_forward(function: Function, how: tuple[int, bool], inputs: tuple[Array, ...]) -> tuple[Array, Hollow]:
    spare, scaled = how
    return inputs[0], Hollow.of(inputs[0], spare, scaled=scaled)


_fork = jax.custom_vjp(_fork_forward, nondiff_argnums=(0, 1))


def _fork_fwd(function: Function, how: tuple[int, bool], inputs: tuple[Array, ...]) -> tuple[tuple[Array, Hollow], Any]:
    return _fork_forward(function, how, inputs), inputs


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fork_bwd(function: Function, how: tuple[int, bool], inputs: tuple[Array, ...], cotangents: tuple[Array, Hollow]) -> tuple[Any]:
    past, hollow = cotangents
    x, *rows = (v.reshape(-1, v.shape[-1]) for v in inputs)
    past = past.reshape(x.shape)
    dx = norm_gradient((x, *rows), hollow.columns, past, scales=hollow.scales, added=hollow.added, function=function)
    # Only where a norm is trained is its weight's gradient computed.
    _, pull = jax.vjp(lambda *rows: function(x, *rows), *rows)
    gradients = (dx, *pull(hollow.whole(x.shape[1])))
    return (tuple(gradient.reshape(v.shape) for gradient, v in zip(gradients, inputs, strict=True)),)


_fork.defvjp(_fork_fwd, _fork_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _value(function: Function, inputs: tuple[Array, ...], hollow: Hollow) -> Array:
    return function(*inputs)


def _value_fwd(function: Function, inputs: tuple[Array, ...], hollow: Hollow) -> tuple[Array, Any]:
    # Of the hollow arrays the shapes beyond their rows are kept.
    return function(*inputs), jax.tree.map(lambda zeros: zeros[:0], hollow)


def _value_bwd(function: Function, like: Hollow, dy: Array) -> tuple[None, Hollow]:
    dy = dy.reshape(-1, dy.shape[-1])
    columns = jnp.pad(dy, ((0, 0), (0, like.columns.shape[1] - dy.shape[1])))
    scales = None if like.scales is None else jnp.ones(len(dy), jnp.float32)
    return None, Hollow(columns, scales, None if like.added is None else jnp.zeros_like(dy))


_value.defvjp(_value_fwd, _value_bwd)
