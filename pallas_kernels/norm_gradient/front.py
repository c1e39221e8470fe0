"""The one entry to the gradient of a norm in a residual block, its reference, and its record."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.functions import Function
from pallas_kernels.norm_gradient import triton, xla

_BACKENDS = {"triton": triton, "xla": xla}


def norm_gradient(
    inputs: Sequence[Float[Array, "_ D"]],
    dy: Float[Array, "N D"],
    past: Float[Array, "N D"],
    *,
    function: Function,
    backend: str = "auto",
) -> Float[Array, "N D"]:
    """dx of (norm(x), x) under the cotangents dy and ``past``: what comes through the norm plus what comes past it.

    ``inputs`` are x [N, D] and the norm's weight (and bias) [1, D], as ``function`` takes them. With n = x / rms(x) and
    g = weight · dy, an RMS norm's part is (g - n · mean(g · n)) / rms(x); a layer norm has n = (x - mean) / std and subtracts mean(g) too.
    Computed in fp32 and rounded once; on a GPU a kernel reads each array once.

    >>> import jax.numpy as jnp
    >>> x, one = jnp.array([[1.0, -1.0]]), jnp.ones((1, 2))
    >>> norm_gradient((x, one), one, 5 * one, function=Function("rms_norm")).tolist()
    [[6.0, 6.0]]

    Raises:
      ValueError: shapes disagree, the function is no norm, or nobody knows the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    _check(inputs, dy, past, function)
    return _BACKENDS[KERNEL.choose(backend, inputs, dy, past, function=function)].gradient(function, inputs, dy, past)


def reference(inputs: Sequence[Array], dy: Array, past: Array, *, function: Function) -> Array:
    """The arguments and result of `norm_gradient`, by autodiff of the definition; computed in fp32."""
    x, weight = (v.astype(jnp.float32) for v in inputs[:2])

    def norm(x: Array) -> Array:
        if function.form == "layer_norm":
            return weight * jax.nn.standardize(x, axis=1, epsilon=function.eps)
        return weight * x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True) + function.eps)

    (dx,) = jax.vjp(norm, x)[1](dy.astype(jnp.float32))
    return (dx + past.astype(jnp.float32)).astype(past.dtype)


def _check(inputs: Sequence[Array], dy: Array, past: Array, function: Function) -> None:
    if function.form not in ("rms_norm", "layer_norm"):
        raise ValueError(f"expected a norm, got {function}")
    x, *rows = inputs
    if x.ndim != 2 or not x.shape == dy.shape == past.shape or any(row.shape != (1, x.shape[1]) for row in rows):
        shapes = ", ".join(str(v.shape) for v in inputs)
        raise ValueError(f"expected x [N, D], rows [1, D], dy and past [N, D], got {shapes}, {dy.shape} and {past.shape}")


def _refuses(backend: str, inputs: Any, dy: Any, past: Any, *, function: Function) -> str | None:
    """Of arrays, or of their shapes and dtypes."""
    return _BACKENDS[backend].refuses(inputs[0])


def _case(dtype: Any, *, rows: int, columns: int, function: Function, weight: Any = None) -> Case:
    draw = np.random.default_rng(0)

    def normal(*shape: int, dtype: Any = dtype) -> Array:
        return jnp.asarray(draw.standard_normal(shape), dtype)

    inputs = (normal(rows, columns) + 0.5, *(normal(1, columns, dtype=weight or dtype) for _ in range(function.inputs[1])))
    arrays = {"inputs": inputs, "dy": normal(rows, columns), "past": normal(rows, columns)}
    return Case(arrays=arrays, static={"function": function}, wrt=())


_RMS, _LAYER = Function("rms_norm", eps=1e-5), Function("layer_norm", eps=1e-6)
CASES = {
    "rms_norm": functools.partial(_case, rows=64, columns=512, function=_RMS),
    "rms_norm_by_fp32": functools.partial(_case, rows=64, columns=256, function=_RMS, weight=jnp.float32),
    "layer_norm": functools.partial(_case, rows=64, columns=320, function=_LAYER),
    "ragged_layer_norm": functools.partial(_case, rows=37, columns=75, function=_LAYER),
    "ragged_rms": functools.partial(_case, rows=19, columns=300, function=_RMS),
}

KERNEL = Kernel(
    name="norm_gradient",
    reference=reference,
    backends={name: functools.partial(norm_gradient, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases=CASES,
    tolerance={"float32": 1e-5, "bfloat16": 1e-2},
)
