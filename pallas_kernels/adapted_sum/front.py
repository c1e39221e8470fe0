"""The one entry to a product with its rows' scales and its adapter's part, its reference, and its record."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.adapted_sum import triton, xla

_BACKENDS = {"triton": triton, "xla": xla}


def adapted_sum(
    z: Float[Array, "N C"],
    scales: Float[Array, " N"] | None,
    u: Float[Array, "N R"],
    b: Float[Array, "F R"],
    *,
    backend: str = "auto",
) -> Float[Array, "N F"]:
    """scales ∘ z + u bᵀ, by rows: what an adapted Linear makes of a product z = x Wᵀ whose rows are scaled afterwards (e4m3).

    ``u`` are the columns of its adapter, A x, and b is s·B; of an input gradient: dy (s·B) and Aᵀ. Without ``scales`` these are ones.
    Of z the first F columns count, as many as b has rows. Summed up in fp32 and rounded once. On a GPU a kernel reads z and writes the sum,
    and nothing else that is wide; XLA writes and reads u bᵀ, rounded. There is no gradient: whoever uses it has one of its own.

    >>> import jax.numpy as jnp
    >>> adapted_sum(jnp.ones((1, 1)), jnp.full(1, 2.0), jnp.ones((1, 1)), jnp.full((1, 1), 3.0)).tolist()
    [[5.0]]

    Raises:
      ValueError: shapes or dtypes disagree, or nobody knows the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    _check(z, scales, u, b)
    return _BACKENDS[KERNEL.choose(backend, z, scales, u, b)].total(z, scales, u, b)


def reference(z: Array, scales: Array | None, u: Array, b: Array) -> Array:
    """The arguments and result of `adapted_sum`, computed in fp32."""
    z32, u32, b32 = (x.astype(jnp.float32) for x in (z[:, : len(b)], u, b))
    return ((z32 if scales is None else scales[:, None] * z32) + u32 @ b32.T).astype(z.dtype)


def _check(z: Array, scales: Array | None, u: Array, b: Array) -> None:
    faults = []
    matrices = z.ndim == u.ndim == b.ndim == 2
    if not matrices or len(u) != len(z) or u.shape[1] != b.shape[1] or len(b) > z.shape[1]:
        faults.append(f"expected z [N, F or more], u [N, R] and b [F, R], got {z.shape}, {u.shape} and {b.shape}")
    if scales is not None and (scales.shape != z.shape[:1] or scales.dtype != jnp.float32):
        faults.append(f"expected scales {z.shape[:1]} in float32, got {scales.shape} {scales.dtype}")
    dtypes = {str(x.dtype) for x in (z, u, b)}
    if len(dtypes) > 1:
        faults.append(f"expected one dtype of all but the scales, got {', '.join(sorted(dtypes))}")
    if faults:
        raise ValueError("; ".join(faults))


def _refuses(backend: str, z: Any, scales: Any, u: Any, b: Any) -> str | None:
    """Of arrays, or of their shapes and dtypes."""
    return _BACKENDS[backend].refuses(z, u.shape[1])


def _case(dtype: Any, *, rows: int, columns: int, rank: int, more: int = 0, scaled: bool = True) -> Case:
    draw = np.random.default_rng(0)
    z, u, b = (jnp.asarray(draw.standard_normal(shape), dtype) for shape in ((rows, columns + more), (rows, rank), (columns, rank)))
    scales = jnp.exp2(jnp.asarray(draw.uniform(-2, 2, rows), jnp.float32)) if scaled else None
    return Case(arrays={"z": z, "scales": scales, "u": u, "b": b}, static={}, wrt=())


CASES = {
    "even": functools.partial(_case, rows=128, columns=512, rank=16),
    "three_adapters": functools.partial(_case, rows=64, columns=192, rank=48),
    "ragged": functools.partial(_case, rows=37, columns=75, rank=5),
    "without_scales": functools.partial(_case, rows=64, columns=128, rank=16, scaled=False),
    "of_a_wide_product": functools.partial(_case, rows=37, columns=128, rank=32, more=64, scaled=False),
    "fewer_columns_than_parts": functools.partial(_case, rows=3, columns=80, rank=8),
}

KERNEL = Kernel(
    name="adapted_sum",
    reference=reference,
    backends={name: functools.partial(adapted_sum, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases=CASES,
    tolerance={"float32": 1e-5, "bfloat16": 1e-2},
)
