"""The one entry to rows in e4m3, its reference, and its record."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.float8_rows import triton, xla
from pallas_kernels.float8_rows.xla import E4M3, LARGEST

_BACKENDS = {"triton": triton, "xla": xla}


def float8_rows(
    x: Float[Array, "N _"], beside: Sequence[Float[Array, "N _"]] = (), *, backend: str = "auto"
) -> tuple[Float[Array, "N C"], Float[Array, " N"]]:
    """(e4m3(r_i / s_i), s_i = max|r_i| / 448 in fp32) of the rows r of x and what is ``beside`` it.

    A row of zeros has scale 1 (Micikevicius et al. 2022, arXiv:2209.05433). On a GPU a kernel reads each array once, and no copy puts them
    beside each other. What is not finite makes its row not finite.

    >>> rounded, scales = float8_rows(jnp.array([[1.0], [0.0]]), [jnp.array([[-2.0], [0.0]])])
    >>> rounded.tolist(), (448 * scales).tolist()
    ([[224.0, -448.0], [0.0, 0.0]], [2.0, 448.0])

    Raises:
      ValueError: an array is not [N, C], or nobody knows the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    if any(part.ndim != 2 or len(part) != len(x) for part in (x, *beside)):
        raise ValueError(f"expected arrays [N, C] of as many rows, got {', '.join(str(part.shape) for part in (x, *beside))}")
    return _BACKENDS[KERNEL.choose(backend, x, beside)].rows((x, *beside))


def reference(x: Array, beside: Sequence[Array] = ()) -> tuple[Array, Array]:
    """The arguments and results of `float8_rows`, computed in fp32."""
    x32 = jnp.concatenate([x, *beside], axis=1).astype(jnp.float32)
    largest = jnp.abs(x32).max(axis=1)
    scales = jnp.where(largest == 0, 1.0, largest / LARGEST)
    return (x32 / scales[:, None]).astype(E4M3), scales


def _refuses(backend: str, x: Any, beside: Sequence[Any] = ()) -> str | None:
    """Of arrays, or of their shapes and dtypes."""
    return _BACKENDS[backend].refuses((x, *beside))


def _case(dtype: Any, *, rows: int, columns: Sequence[int], zeros: int = 0) -> Case:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((rows, sum(columns))) * np.exp2(draw.integers(-20, 20, (rows, 1)))
    x[:zeros] = 0
    first, *beside = jnp.split(jnp.asarray(x, dtype), np.cumsum(columns)[:-1], axis=1)
    return Case(arrays={"x": first, "beside": beside}, static={}, wrt=())


CASES = {
    "even": functools.partial(_case, rows=64, columns=[512]),
    "ragged": functools.partial(_case, rows=37, columns=[275]),
    "zeros": functools.partial(_case, rows=16, columns=[128], zeros=3),
    "two": functools.partial(_case, rows=64, columns=[512, 512]),
    "ragged_three": functools.partial(_case, rows=37, columns=[275, 64, 33], zeros=1),
}

KERNEL = Kernel(
    name="float8_rows",
    reference=reference,
    backends={name: functools.partial(float8_rows, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases=CASES,
    # A reciprocal may round a number beside the middle of two codes to the other one.
    tolerance={"float32": 1e-3, "bfloat16": 1e-3},
)
