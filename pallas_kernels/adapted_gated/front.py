"""The one entry to act(e) ∘ g of products that are yet to be scaled, its reference, and its record."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.adapted_gated import triton, xla
from pallas_kernels.lora_swiglu.activations import ACTIVATIONS

type Pair = tuple[Array, Array]

_BACKENDS = {"triton": triton, "xla": xla}


def adapted_gated(
    products: tuple[Float[Array, "N F"], Float[Array, "N F"]],
    scales: tuple[Float[Array, " N"], Float[Array, " N"]],
    us: tuple[Float[Array, "N Rg"], Float[Array, "N Ru"]],
    bs: tuple[Float[Array, "F Rg"], Float[Array, "F Ru"]],
    a: Float[Array, "R F"],
    *,
    activation: str = "silu",
    backend: str = "auto",
) -> tuple[Float[Array, "N F"], Float[Array, "N F"], Float[Array, "N F"], Float[Array, "N R"]]:
    """(e, g, h, u): e and g are scales ∘ products + us bsᵀ, by rows, of a gated MLP's gate and up; h = act(e) ∘ g, u = h aᵀ.

    The products are in a format whose rows are scaled afterwards (e4m3), us the columns A x of the two adapters, bs their s·B, and a the A
    of the projection that follows. Scales are fp32, all else is of one dtype; e and g are summed in fp32 and rounded once, h is of the
    rounded ones, u is accumulated in fp32. On a GPU a kernel reads the products once, and no update is written. There is no gradient:
    whoever uses it has one of its own (`gated_gradients`).

    >>> import jax.numpy as jnp
    >>> one, two = jnp.ones((1, 1)), jnp.full(1, 2.0)
    >>> [round(x.item(), 4) for x in adapted_gated((one, one), (two, two), (one, one), (one, one), one)]
    [3.0, 3.0, 8.5732, 8.5732]

    Raises:
      ValueError: shapes or dtypes disagree, or nobody knows the activation or the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    _check(products, scales, us, bs, a, activation)
    chosen = KERNEL.choose(backend, products, scales, us, bs, a, activation=activation)
    return _BACKENDS[chosen].made(products, scales, us, bs, a, activation)


def reference(products: Pair, scales: Pair, us: Pair, bs: Pair, a: Array, *, activation: str = "silu") -> tuple[Array, ...]:
    """The arguments and results of `adapted_gated`, computed in fp32."""
    wide = ([x.astype(jnp.float32) for x in pair] for pair in (products, us, bs))
    e, g = (s[:, None] * z + u @ b.T for s, z, u, b in zip(scales, *wide, strict=True))
    h = ACTIVATIONS[activation](e) * g
    return tuple(x.astype(a.dtype) for x in (e, g, h, h @ a.astype(jnp.float32).T))


def _check(products: Pair, scales: Pair, us: Pair, bs: Pair, a: Array, activation: str) -> None:
    N, F = products[0].shape[0], products[0].shape[-1]
    faults = []
    if any(z.shape != (N, F) for z in products):
        faults.append(f"expected two products [N, F], got {_shapes(products)}")
    if any(s.shape != (N,) or s.dtype != jnp.float32 for s in scales):
        faults.append(f"expected scales [{N}] in float32, got {', '.join(f'{s.shape} {s.dtype}' for s in scales)}")
    if any(u.ndim != 2 or u.shape[0] != N or b.shape != (F, u.shape[1]) for u, b in zip(us, bs, strict=True)):
        faults.append(f"expected us [{N}, R] and bs [{F}, R], got {_shapes(us)} and {_shapes(bs)}")
    if a.ndim != 2 or a.shape[1] != F:
        faults.append(f"expected a [R, {F}], got {a.shape}")
    dtypes = {str(x.dtype) for x in (*products, *us, *bs, a)}
    if len(dtypes) > 1:
        faults.append(f"expected one dtype of all but the scales, got {', '.join(sorted(dtypes))}")
    if activation not in ACTIVATIONS:
        faults.append(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if faults:
        raise ValueError("; ".join(faults))


def _shapes(arrays: Pair) -> str:
    return ", ".join(str(x.shape) for x in arrays)


def _refuses(backend: str, products: Any, scales: Any, us: Any, bs: Any, a: Any, *, activation: str = "silu") -> str | None:
    """Of arrays, or of their shapes and dtypes."""
    return _BACKENDS[backend].refuses(products[0], (*(u.shape[1] for u in us), a.shape[0]))


def _case(dtype: Any, *, rows: int, columns: int, ranks: tuple[int, int, int], **static: Any) -> Case:
    draw = np.random.default_rng(0)
    *first, last = ranks

    def normal(*shape: int) -> Array:
        return jnp.asarray(draw.standard_normal(shape), dtype)

    arrays = {
        "products": (normal(rows, columns), normal(rows, columns)),
        "scales": tuple(jnp.asarray(0.5 + draw.random(rows), jnp.float32) for _ in first),
        "us": tuple(normal(rows, rank) for rank in first),
        "bs": tuple(normal(columns, rank) for rank in first),
        "a": normal(last, columns),
    }
    return Case(arrays=arrays, static=static, wrt=())


CASES = {
    "silu": functools.partial(_case, rows=256, columns=192, ranks=(16, 16, 16)),
    "gelu": functools.partial(_case, rows=128, columns=64, ranks=(8, 8, 8), activation="gelu"),
    "gelu_tanh": functools.partial(_case, rows=128, columns=128, ranks=(16, 16, 16), activation="gelu_tanh"),
    "ragged_everywhere": functools.partial(_case, rows=173, columns=75, ranks=(5, 3, 20)),
    "fewer_columns_than_parts": functools.partial(_case, rows=3, columns=80, ranks=(16, 8, 4)),
}

KERNEL = Kernel(
    name="adapted_gated",
    reference=reference,
    backends={name: functools.partial(adapted_gated, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases=CASES,
    # 16-bit: e, g and h are rounded before they multiply.
    tolerance={"float32": 1e-5, "bfloat16": 1e-2},
)
