"""The one entry to log Σ exp of rows, its reference, and its record."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.logsumexp import triton, xla

_BACKENDS = {"triton": triton, "xla": xla}


def logsumexp(t: Float[Array, "N V"], *, backend: str = "auto") -> Float[Array, " N"]:
    """log Σ_j exp(t_ij) of each row of fp32 logits, in one pass over it.

    A row is read once: with the largest number m so far, the sum of exp(t - m) is corrected whenever m grows (Milakov and Gimelshein 2018,
    arXiv:1805.02867). There is no gradient: whoever uses it has one of its own.

    >>> import jax.numpy as jnp
    >>> logsumexp(jnp.log(jnp.array([[1.0, 3.0]]))).round(4).tolist() == jnp.log(jnp.array([4.0])).round(4).tolist()
    True

    Raises:
      ValueError: t is not [N, V] in fp32, or nobody knows the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    if t.ndim != 2 or t.dtype != jnp.float32:
        raise ValueError(f"expected [N, V] in float32, got {t.shape} in {t.dtype}")
    return _BACKENDS[KERNEL.choose(backend, t)].logsumexp(t)


def reference(t: Array) -> Array:
    """The argument and result of `logsumexp`, by JAX's own."""
    return jax.nn.logsumexp(t, axis=1)


def _refuses(backend: str, t: Any) -> str | None:
    return _BACKENDS[backend].refuses()


def _case(dtype: Any, *, rows: int, columns: int, around: float = 0.0, spread: float = 3.0) -> Case:
    """Of fp32, whatever the dtype."""
    draw = np.random.default_rng(0)
    return Case(arrays={"t": jnp.asarray(around + spread * draw.standard_normal((rows, columns)), jnp.float32)}, static={}, wrt=())


CASES = {
    "even": functools.partial(_case, rows=16, columns=1024),
    "ragged": functools.partial(_case, rows=7, columns=301),
    "one_column": functools.partial(_case, rows=3, columns=1),
    "far_from_zero": functools.partial(_case, rows=8, columns=500, around=-1e4, spread=300.0),
}

KERNEL = Kernel(
    name="logsumexp",
    reference=reference,
    backends={name: functools.partial(logsumexp, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases=CASES,
    tolerance={"float32": 1e-6, "bfloat16": 1e-6},
)
