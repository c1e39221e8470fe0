"""The one entry to an activation of products that are yet to be scaled, its reference, and its record."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
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
    scales: Sequence[Float[Array, " N"]] | None,
    updates: Sequence[tuple[Float[Array, "N _"], Float[Array, "F _"]]],
    a: Float[Array, "R F"],
    *,
    function: Function,
    bias: Float[Array, "1 F"] | None = None,
    padding: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "N C"], Float[Array, "N R"]]:
    """(h, u) of an MLP: h = function(*y, bias) of its first products y = scales ∘ products + u_i b_iᵀ, by rows, and u = h aᵀ.

    With a ``padding`` h comes as [h, u, 0], so many zeros behind u: one operand of the projection that follows. ``function`` is "gated",
    act(y₁) ∘ y₂, or "plain", act(y₁ + bias). The products may be in a format whose rows are scaled afterwards (e4m3; others have no
    scales), ``updates`` are their adapters' columns u_i = A x and s·B, and a is the A of the projection that follows. Scales are fp32, all
    else is of one dtype; h is rounded once, u is accumulated in fp32. On a GPU a kernel reads the products once, and keeps y in fp32, which
    XLA rounds; neither an update nor y is written. There is no gradient: whoever uses it has one of its own, of the products as they are
    (`gated_gradients` and `plain_gradients`, which make y again).

    >>> import jax.numpy as jnp
    >>> one, two = jnp.ones((1, 1)), jnp.full(1, 2.0)
    >>> h, u = adapted_activation((one, one), (two, two), ((one, one), (one, one)), one, function=Function("gated", "silu"))
    >>> round(h.item(), 4), round(u.item(), 4)
    (8.5732, 8.5732)

    Raises:
      ValueError: shapes or dtypes disagree, or nobody knows the activation or the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    _check(products, scales, updates, a, function, bias)
    chosen = KERNEL.choose(backend, products, scales, updates, a, function=function, bias=bias, padding=padding)
    return _BACKENDS[chosen].made(products, scales, updates, a, bias, function, padding)


def reference(
    products: Sequence[Array],
    scales: Sequence[Array] | None,
    updates: Sequence[tuple[Array, Array]],
    a: Array,
    *,
    function: Function,
    bias: Array | None = None,
    padding: int | None = None,
) -> tuple[Array, Array]:
    """The arguments and results of `adapted_activation`, computed in fp32."""
    products, updates = jax.tree.map(lambda x: x.astype(jnp.float32), (products, updates))
    scaled = products if scales is None else [s[:, None] * z for z, s in zip(products, scales, strict=True)]
    y, *others = (z + u @ b.T for z, (u, b) in zip(scaled, updates, strict=True))
    h = ACTIVATIONS[function.activation](y) * others[0] if bias is None else PLAIN[function.activation](y + bias.astype(jnp.float32))
    u = h @ a.astype(jnp.float32).T
    both = h if padding is None else jnp.pad(jnp.concatenate([h, u], axis=1), ((0, 0), (0, padding)))
    return both.astype(a.dtype), u.astype(a.dtype)


def _check(
    products: Sequence[Array],
    scales: Sequence[Array] | None,
    updates: Sequence[tuple[Array, Array]],
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
    given = updates if scales is None else scales
    if any(len(each) != len(products) for each in (given, updates)):
        faults.append(f"expected scales and updates of {len(products)} products, got {len(given)} and {len(updates)}")
    if scales is not None and any(s.shape != (N,) or s.dtype != jnp.float32 for s in scales):
        faults.append(f"expected scales [{N}] in float32, got {', '.join(f'{s.shape} {s.dtype}' for s in scales)}")
    if any(u.ndim != 2 or u.shape[0] != N or b.shape != (F, u.shape[1]) for u, b in updates):
        faults.append(f"expected updates ([{N}, R], [{F}, R]), got {', '.join(f'({_shapes(pair)})' for pair in updates)}")
    if (bias is not None) != bool(rows) or (bias is not None and bias.shape != (1, F)):
        faults.append(f"expected a bias [1, {F}] for plain and none for gated, got {None if bias is None else bias.shape}")
    if a.ndim != 2 or a.shape[1] != F:
        faults.append(f"expected a [R, {F}], got {a.shape}")
    dtypes = {str(x.dtype) for x in (*products, *itertools.chain(*updates), a, *(() if bias is None else (bias,)))}
    if len(dtypes) > 1:
        faults.append(f"expected one dtype of all but the scales, got {', '.join(sorted(dtypes))}")
    if faults:
        raise ValueError("; ".join(faults))


def _shapes(arrays: Sequence[Array]) -> str:
    return ", ".join(str(x.shape) for x in arrays)


def _refuses(backend: str, products: Any, scales: Any, updates: Any, a: Any, **static: Any) -> str | None:
    """Of arrays, or of their shapes and dtypes."""
    return _BACKENDS[backend].refuses(products[0], (*(u.shape[1] for u, _ in updates), a.shape[0]))


def _case(
    dtype: Any, *, rows: int, columns: int, ranks: tuple[int, ...], activation: str, padding: int | None = None, scaled: bool = True
) -> Case:
    draw = np.random.default_rng(0)
    *first, last = ranks

    def normal(*shape: int) -> Array:
        return jnp.asarray(draw.standard_normal(shape), dtype)

    arrays = {
        "products": tuple(normal(rows, columns) for _ in first),
        "scales": tuple(jnp.asarray(0.5 + draw.random(rows), jnp.float32) for _ in first) if scaled else None,
        "updates": tuple((normal(rows, rank), normal(columns, rank)) for rank in first),
        "a": normal(last, columns),
        **({"bias": normal(1, columns)} if len(first) == 1 else {}),
    }
    function = Function("gated" if len(first) == 2 else "plain", activation)
    return Case(arrays=arrays, static={"function": function, "padding": padding}, wrt=())


CASES = {
    "silu": functools.partial(_case, rows=256, columns=192, ranks=(16, 16, 16), activation="silu"),
    "gelu": functools.partial(_case, rows=128, columns=64, ranks=(8, 8, 8), activation="gelu"),
    "gelu_tanh": functools.partial(_case, rows=128, columns=128, ranks=(16, 16, 16), activation="gelu_tanh"),
    "plain_quick_gelu": functools.partial(_case, rows=256, columns=192, ranks=(16, 16), activation="quick_gelu"),
    "plain_gelu": functools.partial(_case, rows=37, columns=75, ranks=(5, 20), activation="gelu"),
    "ragged_everywhere": functools.partial(_case, rows=173, columns=75, ranks=(5, 3, 20), activation="silu"),
    "beside": functools.partial(_case, rows=128, columns=128, ranks=(16, 16, 16), activation="silu", padding=48, scaled=False),
    "plain_beside": functools.partial(_case, rows=37, columns=80, ranks=(5, 16), activation="gelu", padding=0, scaled=False),
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
