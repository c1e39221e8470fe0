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
    dy: Float[Array, "N C"],
    past: Float[Array, "N D"],
    *,
    scales: Float[Array, " N"] | None = None,
    added: Float[Array, "N D"] | None = None,
    function: Function,
    backend: str = "auto",
) -> Float[Array, "N D"]:
    """dx of (norm(x), x) under the cotangents dy and ``past``: what comes through the norm plus what comes past it.

    ``inputs`` are x [N, D] and the norm's weight (and bias) [1, D], as ``function`` takes them. Of dy the first D columns count; they
    stand for scales ∘ dy + added where either is given, as a product in e4m3 and an update come. With n = x / rms(x) and
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
    _check(inputs, dy, past, scales, added, function)
    chosen = KERNEL.choose(backend, inputs, dy, past, scales=scales, added=added, function=function)
    return _BACKENDS[chosen].gradient(function, inputs, dy, past, scales, added)


def reference(
    inputs: Sequence[Array], dy: Array, past: Array, *, scales: Array | None = None, added: Array | None = None, function: Function
) -> Array:
    """The arguments and result of `norm_gradient`, by autodiff of the definition; computed in fp32."""
    x, weight = (v.astype(jnp.float32) for v in inputs[:2])

    def norm(x: Array) -> Array:
        if function.form == "layer_norm":
            return weight * jax.nn.standardize(x, axis=1, epsilon=function.eps)
        return weight * x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True) + function.eps)

    dy = dy[:, : x.shape[1]].astype(jnp.float32)
    if scales is not None:
        dy = scales[:, None] * dy
    if added is not None:
        dy = dy + added.astype(jnp.float32)
    (dx,) = jax.vjp(norm, x)[1](dy)
    return (dx + past.astype(jnp.float32)).astype(past.dtype)


def _check(inputs: Sequence[Array], dy: Array, past: Array, scales: Array | None, added: Array | None, function: Function) -> None:
    if function.form not in ("rms_norm", "layer_norm"):
        raise ValueError(f"expected a norm, got {function}")
    x, *rows = inputs
    right = x.ndim == dy.ndim == 2 and x.shape == past.shape and len(x) == len(dy) and dy.shape[1] >= x.shape[1]
    if not right or any(row.shape != (1, x.shape[1]) for row in rows):
        shapes = ", ".join(str(v.shape) for v in inputs)
        raise ValueError(f"expected x [N, D], rows [1, D], dy [N, D or more] and past [N, D], got {shapes}, {dy.shape} and {past.shape}")
    given = {"scales": (scales, x.shape[:1]), "what is added": (added, x.shape)}
    wrong = [f"{name} {shape}, got {v.shape}" for name, (v, shape) in given.items() if v is not None and v.shape != shape]
    if wrong:
        raise ValueError(f"expected {'; '.join(wrong)}")


def _refuses(backend: str, inputs: Any, dy: Any, past: Any, **others: Any) -> str | None:
    """Of arrays, or of their shapes and dtypes."""
    return _BACKENDS[backend].refuses(inputs[0])


def _case(
    dtype: Any, *, rows: int, columns: int, more: int, function: Function, weight: Any = None, scaled: bool = False, added: bool = False
) -> Case:
    draw = np.random.default_rng(0)

    def normal(*shape: int, dtype: Any = dtype) -> Array:
        return jnp.asarray(draw.standard_normal(shape), dtype)

    inputs = (normal(rows, columns) + 0.5, *(normal(1, columns, dtype=weight or dtype) for _ in range(function.inputs[1])))
    arrays = {"inputs": inputs, "dy": normal(rows, columns + more), "past": normal(rows, columns)}
    if scaled:
        arrays["scales"] = jnp.exp2(jnp.asarray(draw.uniform(-2, 2, rows), jnp.float32))
    if added:
        arrays["added"] = normal(rows, columns)
    return Case(arrays=arrays, static={"function": function}, wrt=())


_RMS, _LAYER = Function("rms_norm", eps=1e-5), Function("layer_norm", eps=1e-6)
CASES = {
    "rms_norm": functools.partial(_case, rows=64, columns=512, more=32, function=_RMS),
    "rms_norm_by_fp32": functools.partial(_case, rows=64, columns=256, more=0, function=_RMS, weight=jnp.float32),
    "layer_norm": functools.partial(_case, rows=64, columns=320, more=16, function=_LAYER),
    "ragged_layer_norm": functools.partial(_case, rows=37, columns=75, more=0, function=_LAYER),
    "ragged_rms": functools.partial(_case, rows=19, columns=300, more=20, function=_RMS),
    "scaled_rms": functools.partial(_case, rows=37, columns=300, more=0, function=_RMS, scaled=True, added=True),
    "added_rms": functools.partial(_case, rows=64, columns=512, more=64, function=_RMS, added=True),
    "ragged_scaled": functools.partial(_case, rows=19, columns=75, more=0, function=_RMS, scaled=True),
    "scaled_layer_norm": functools.partial(_case, rows=64, columns=320, more=16, function=_LAYER, scaled=True, added=True),
}

KERNEL = Kernel(
    name="norm_gradient",
    reference=reference,
    backends={name: functools.partial(norm_gradient, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases=CASES,
    tolerance={"float32": 1e-5, "bfloat16": 1e-2},
)
