"""The one entry to an activation of products that are yet to be scaled, its reference, and its record."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.adapted_activation import triton, xla
from pallas_kernels.functions import PLAIN, Function
from pallas_kernels.lora_swiglu.activations import ACTIVATIONS

_BACKENDS = {"triton": triton, "xla": xla}


def adapted_activation(
    products: Sequence[Float[Array, "N F"]],
    scales: Sequence[Float[Array, " N"]],
    us: Sequence[Float[Array, "N _"]],
    bs: Sequence[Float[Array, "F _"]],
    a: Float[Array, "R F"],
    *,
    function: Function,
    bias: Float[Array, "1 F"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "N F"], Float[Array, "N R"]]:
    """(h, u) of an MLP: h = function(*y, bias) of its first products y = scales ∘ products + us bsᵀ, by rows, and u = h aᵀ.

    ``function`` is "gated", act(y₁) ∘ y₂, or "plain", act(y₁ + bias). The products are in a format whose rows are scaled afterwards
    (e4m3), us are the columns A x of their adapters, bs their s·B, and a is the A of the projection that follows. Scales are fp32, all
    else is of one dtype; h is rounded once, u is accumulated in fp32. On a GPU a kernel reads the products once, and keeps y in fp32, which
    XLA rounds; neither an update nor y is written. There is no gradient: whoever uses it has one of its own, of the products as
    they are (`gated_gradients` and `plain_gradients`, which make y again).

    >>> import jax.numpy as jnp
    >>> one, two = jnp.ones((1, 1)), jnp.full(1, 2.0)
    >>> h, u = adapted_activation((one, one), (two, two), (one, one), (one, one), one, function=Function("gated", "silu"))
    >>> round(h.item(), 4), round(u.item(), 4)
    (8.5732, 8.5732)

    Raises:
      ValueError: shapes or dtypes disagree, or nobody knows the activation or the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    _check(products, scales, us, bs, a, function, bias)
    chosen = KERNEL.choose(backend, products, scales, us, bs, a, function=function, bias=bias)
    return _BACKENDS[chosen].made(products, scales, us, bs, a, bias, function)


def reference(
    products: Sequence[Array],
    scales: Sequence[Array],
    us: Sequence[Array],
    bs: Sequence[Array],
    a: Array,
    *,
    function: Function,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    """The arguments and results of `adapted_activation`, computed in fp32."""
    wide = ([x.astype(jnp.float32) for x in each] for each in (products, us, bs))
    y, *others = (s[:, None] * z + u @ b.T for s, z, u, b in zip(scales, *wide, strict=True))
    h = ACTIVATIONS[function.activation](y) * others[0] if bias is None else PLAIN[function.activation](y + bias.astype(jnp.float32))
    return h.astype(a.dtype), (h @ a.astype(jnp.float32).T).astype(a.dtype)


def _check(
    products: Sequence[Array],
    scales: Sequence[Array],
    us: Sequence[Array],
    bs: Sequence[Array],
    a: Array,
    function: Function,
    bias: Array | None,
) -> None:
    N, F = products[0].shape[0], products[0].shape[-1]
    wide, rows = function.inputs
    faults = []
    if function.form not in ("gated", "plain"):
        faults.append(f'function must be "gated" or "plain", got {function.form!r}')
    known = {"plain": PLAIN, "gated": ACTIVATIONS}.get(function.form)
    if known is not None and function.activation not in known:
        faults.append(f"the activation of {function.form} must be one of {', '.join(known)}, got {function.activation!r}")
    if len(products) != wide or any(z.shape != (N, F) for z in products):
        faults.append(f"expected products [N, F], {wide} for {function.form}, got {_shapes(products)}")
    if any(len(each) != len(products) for each in (scales, us, bs)):
        faults.append(f"expected scales, us and bs of {len(products)} products, got {len(scales)}, {len(us)} and {len(bs)}")
    if any(s.shape != (N,) or s.dtype != jnp.float32 for s in scales):
        faults.append(f"expected scales [{N}] in float32, got {', '.join(f'{s.shape} {s.dtype}' for s in scales)}")
    if any(u.ndim != 2 or u.shape[0] != N or b.shape != (F, u.shape[1]) for u, b in zip(us, bs, strict=False)):
        faults.append(f"expected us [{N}, R] and bs [{F}, R], got {_shapes(us)} and {_shapes(bs)}")
    if (bias is not None) != bool(rows) or (bias is not None and bias.shape != (1, F)):
        faults.append(f"expected a bias [1, {F}] for plain and none for gated, got {None if bias is None else bias.shape}")
    if a.ndim != 2 or a.shape[1] != F:
        faults.append(f"expected a [R, {F}], got {a.shape}")
    dtypes = {str(x.dtype) for x in (*products, *us, *bs, a, *(() if bias is None else (bias,)))}
    if len(dtypes) > 1:
        faults.append(f"expected one dtype of all but the scales, got {', '.join(sorted(dtypes))}")
    if faults:
        raise ValueError("; ".join(faults))


def _shapes(arrays: Sequence[Array]) -> str:
    return ", ".join(str(x.shape) for x in arrays)


def _refuses(backend: str, products: Any, scales: Any, us: Any, bs: Any, a: Any, *, function: Function, bias: Any = None) -> str | None:
    """Of arrays, or of their shapes and dtypes."""
    return _BACKENDS[backend].refuses(products[0], (*(u.shape[1] for u in us), a.shape[0]))


def _case(dtype: Any, *, rows: int, columns: int, ranks: tuple[int, ...], activation: str) -> Case:
    draw = np.random.default_rng(0)
    *first, last = ranks

    def normal(*shape: int) -> Array:
        return jnp.asarray(draw.standard_normal(shape), dtype)

    arrays = {
        "products": tuple(normal(rows, columns) for _ in first),
        "scales": tuple(jnp.asarray(0.5 + draw.random(rows), jnp.float32) for _ in first),
        "us": tuple(normal(rows, rank) for rank in first),
        "bs": tuple(normal(columns, rank) for rank in first),
        "a": normal(last, columns),
        **({"bias": normal(1, columns)} if len(first) == 1 else {}),
    }
    return Case(arrays=arrays, static={"function": Function("gated" if len(first) == 2 else "plain", activation)}, wrt=())


CASES = {
    "silu": functools.partial(_case, rows=256, columns=192, ranks=(16, 16, 16), activation="silu"),
    "gelu": functools.partial(_case, rows=128, columns=64, ranks=(8, 8, 8), activation="gelu"),
    "gelu_tanh": functools.partial(_case, rows=128, columns=128, ranks=(16, 16, 16), activation="gelu_tanh"),
    "plain_quick_gelu": functools.partial(_case, rows=256, columns=192, ranks=(16, 16), activation="quick_gelu"),
    "plain_gelu": functools.partial(_case, rows=37, columns=75, ranks=(5, 20), activation="gelu"),
    "ragged_everywhere": functools.partial(_case, rows=173, columns=75, ranks=(5, 3, 20), activation="silu"),
    "fewer_columns_than_parts": functools.partial(_case, rows=3, columns=80, ranks=(16, 8, 4), activation="silu"),
}

KERNEL = Kernel(
    name="adapted_activation",
    reference=reference,
    backends={name: functools.partial(adapted_activation, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases=CASES,
    # 16-bit: the finished products and h are rounded before they multiply.
    tolerance={"float32": 1e-5, "bfloat16": 1e-2},
)
