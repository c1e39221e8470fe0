"""The one entry to products with a packed weight, its reference, its custom VJP, and its record."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import packed
from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.int4_matmul import mosaic, triton, xla
from pallas_kernels.packed import Packed

_BACKENDS = {"xla": xla, "mosaic": mosaic, "triton": triton}

type Addend = tuple[Float[Array, "N R"], Float[Array, "_ R"]]


def int4_matmul(
    x: Float[Array, "N _"], weight: Packed, update: Addend | None = None, *, transpose: bool = False, backend: str = "auto"
) -> Float[Array, "N _"]:
    """x Wᵀ (+ u bᵀ) or, with ``transpose``, x W (+ u bᵀ), for W [O, I] of 4-bit codes in groups of 64 along I.

    ``x`` is [N, I] ([N, O] with ``transpose``), ``update`` is (u [N, R], b [O, R]; b [I, R] with ``transpose``): an adapter's part, added
    in the accumulator, s·B·(A x) of a forward product for u = A x and b = s·B. Each weight is rounded once to x's dtype; products
    accumulate in fp32; the result has x's dtype. Saved for the backward: the packed weight and the update. Codes have no gradient.

    Backends: "xla" decodes the whole weight and calls cuBLAS; "mosaic" (sm90) and "triton" (sm80) decode tiles in registers. "auto" takes
    the one that was measured to be fastest on this device, else "xla".

    >>> import jax.numpy as jnp
    >>> two = Packed(jnp.full((3, 32), 0x22, jnp.uint8), jnp.ones((3, 1)), None, 64)
    >>> int4_matmul(jnp.ones((1, 64)), two).tolist()
    [[128.0, 128.0, 128.0]]

    Raises:
      ValueError: shapes or dtypes disagree, or nobody knows the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    _check(x, weight, update, transpose)
    return _product(transpose, KERNEL.choose(backend, x, weight, update, transpose=transpose), x, weight, update)


def reference(x: Float[Array, "N _"], weight: Packed, update: Addend | None = None, *, transpose: bool = False) -> Float[Array, "N _"]:
    """The arguments and result of `int4_matmul`, by the definition; computed in fp32."""
    w = packed.reference_decode(weight, x.dtype)
    y = x.astype(jnp.float32) @ (w if transpose else w.T)
    if update is not None:
        u, b = (part.astype(jnp.float32) for part in update)
        y = y + u @ b.T
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(transpose: bool, backend: str, x: Array, weight: Packed, update: Addend | None) -> Array:
    return _BACKENDS[backend].product(x, weight, update, transpose)


def _forward(transpose, backend, x, weight, update):
    return _product(transpose, backend, x, weight, update), (weight, update)


def _backward(transpose, backend, saved, dy):
    weight, update = saved
    # Tiles of the gradient fit other shapes than those of the product.
    able = KERNEL.refuses(backend, dy, weight, transpose=not transpose) is None
    dx = int4_matmul(dy, weight, transpose=not transpose, backend=backend if able else "xla")
    if update is None:
        return dx, None, None
    u, b = update
    db = jax.lax.dot_general(dy, u, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return dx, None, ((dy @ b.astype(dy.dtype)).astype(u.dtype), db.astype(b.dtype))


_product.defvjp(_forward, _backward)


def _check(x: Array, weight: Packed, update: Addend | None, transpose: bool) -> None:
    (rows, columns), faults = weight.shape if transpose else weight.shape[::-1], []
    if x.ndim != 2 or x.shape[1] != rows:
        faults.append(f"expected x [N, {rows}] for a weight {weight.shape} (transpose={transpose}), got {x.shape}")
    if update is not None:
        u, b = update
        if u.shape[0] != x.shape[0] or b.shape != (columns, u.shape[1]):
            faults.append(f"expected u [{x.shape[0]}, R] and b [{columns}, R], got {u.shape} and {b.shape}")
        if u.dtype != x.dtype or b.dtype != x.dtype:
            faults.append(f"u and b must have the dtype of x, {x.dtype}, got {u.dtype} and {b.dtype}")
    if faults:
        raise ValueError("; ".join(faults))


def _refuses(backend: str, x: Array, weight: Packed, update: Addend | None = None, *, transpose: bool = False) -> str | None:
    return _BACKENDS[backend].refuses(x, weight, update, transpose)


def _case(dtype: Any, *, rows: int, shape: tuple[int, int], form: str = "int4", rank: int = 0, transpose: bool = False) -> Case:
    draw = np.random.default_rng(0)
    contracted, out = shape if transpose else shape[::-1]
    arrays: dict[str, Any] = {"x": jnp.asarray(draw.standard_normal((rows, contracted)), dtype)}
    arrays["weight"] = packed.random(draw, shape, form, dtype)
    if rank:
        arrays["update"] = tuple(jnp.asarray(draw.standard_normal((n, rank)) * rank**-0.5, dtype) for n in (rows, out))
    return Case(arrays=arrays, static={"transpose": transpose}, wrt=("x", "update") if rank else ("x",))


CASES = {
    "one_row": functools.partial(_case, rows=1, shape=(128, 256)),
    "adapted_transposed": functools.partial(_case, rows=128, shape=(192, 256), rank=16, transpose=True),
    "ragged_everywhere": functools.partial(_case, rows=45, shape=(70, 100), rank=3),
    "ragged_transposed": functools.partial(_case, rows=45, shape=(70, 100), rank=3, transpose=True),
    "nf4": functools.partial(_case, rows=64, shape=(128, 192), form="nf4", rank=8),
    "nf4_transposed": functools.partial(_case, rows=64, shape=(128, 192), form="nf4", rank=8, transpose=True),
    "several_tiles": functools.partial(_case, rows=300, shape=(512, 448), rank=5),
}

KERNEL = Kernel(
    name="int4_matmul",
    reference=reference,
    backends={name: functools.partial(int4_matmul, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases=CASES,
    # 16-bit: the result is rounded once; the gradient by u of a rounded product is again.
    tolerance={"float32": 1e-5, "bfloat16": 5e-3},
)
