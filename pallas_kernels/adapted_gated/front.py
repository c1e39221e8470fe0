"""The one entry to act(e) ∘ g of products that are yet to be scaled, its reference, and its record."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.adapted_gated import triton, xla
from pallas_kernels.lora_swiglu.activations import ACTIVATIONS

_BACKENDS = {"triton": triton, "xla": xla}


def adapted_gated(
    e: Float[Array, "N F"],
    g: Float[Array, "N F"],
    e_scales: Float[Array, " N"],
    g_scales: Float[Array, " N"],
    u_gate: Float[Array, "N Rg"],
    u_up: Float[Array, "N Ru"],
    b_gate: Float[Array, "F Rg"],
    b_up: Float[Array, "F Ru"],
    a: Float[Array, "R F"],
    *,
    activation: str = "silu",
    backend: str = "auto",
) -> tuple[Float[Array, "N F"], Float[Array, "N F"], Float[Array, "N F"], Float[Array, "N R"]]:
    """(e', g', h, u): e'_i = e_scales_i · e_i + u_gate_i b_gateᵀ, g' likewise, h = act(e') ∘ g', u = h aᵀ.

    e and g are products of a gated MLP's input in a format whose rows are scaled afterwards (e4m3), u_gate and u_up the columns A x of its
    adapters, b their s·B, and a the A of the projection that follows. Scales are fp32, all else is of one dtype; e' and g' are summed in
    fp32 and rounded once, h is of the rounded ones, u is accumulated in fp32. On a GPU a kernel reads e and g once, and no update is
    written. There is no gradient: whoever uses it has one of its own (`gated_gradients`).

    >>> import jax.numpy as jnp
    >>> one, two = jnp.ones((1, 1)), jnp.full(1, 2.0)
    >>> [round(x.item(), 4) for x in adapted_gated(one, one, two, two, one, one, one, one, one)]
    [3.0, 3.0, 8.5732, 8.5732]

    Raises:
      ValueError: shapes or dtypes disagree, or nobody knows the activation or the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    arrays = e, g, e_scales, g_scales, u_gate, u_up, b_gate, b_up, a
    _check(*arrays, activation)
    return _BACKENDS[KERNEL.choose(backend, *arrays, activation=activation)].made(*arrays, activation)


def reference(
    e: Array,
    g: Array,
    e_scales: Array,
    g_scales: Array,
    u_gate: Array,
    u_up: Array,
    b_gate: Array,
    b_up: Array,
    a: Array,
    *,
    activation: str = "silu",
) -> tuple[Array, ...]:
    """The arguments and results of `adapted_gated`, computed in fp32."""
    e32, g32, u_gate32, u_up32, b_gate32, b_up32, a32 = (x.astype(jnp.float32) for x in (e, g, u_gate, u_up, b_gate, b_up, a))
    made_e, made_g = e_scales[:, None] * e32 + u_gate32 @ b_gate32.T, g_scales[:, None] * g32 + u_up32 @ b_up32.T
    h = ACTIVATIONS[activation](made_e) * made_g
    return tuple(x.astype(e.dtype) for x in (made_e, made_g, h, h @ a32.T))


def _check(
    e: Array,
    g: Array,
    e_scales: Array,
    g_scales: Array,
    u_gate: Array,
    u_up: Array,
    b_gate: Array,
    b_up: Array,
    a: Array,
    activation: str,
) -> None:
    faults = []
    if e.ndim != 2 or e.shape != g.shape:
        faults.append(f"expected e and g [N, F], got {e.shape} and {g.shape}")
    N, F = e.shape
    if not e_scales.shape == g_scales.shape == (N,) or not e_scales.dtype == g_scales.dtype == jnp.float32:
        faults.append(f"expected scales [{N}] in float32, got {e_scales.shape} {e_scales.dtype} and {g_scales.shape} {g_scales.dtype}")
    for name, u, b in (("gate", u_gate, b_gate), ("up", u_up, b_up)):
        if u.ndim != 2 or u.shape[0] != N or b.shape != (F, u.shape[1]):
            faults.append(f"expected u_{name} [{N}, R] and b_{name} [{F}, R], got {u.shape} and {b.shape}")
    if a.ndim != 2 or a.shape[1] != F:
        faults.append(f"expected a [R, {F}], got {a.shape}")
    dtypes = {str(x.dtype) for x in (e, g, u_gate, u_up, b_gate, b_up, a)}
    if len(dtypes) > 1:
        faults.append(f"expected one dtype of all but the scales, got {', '.join(sorted(dtypes))}")
    if activation not in ACTIVATIONS:
        faults.append(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if faults:
        raise ValueError("; ".join(faults))


def _refuses(
    backend: str,
    e: Any,
    g: Any,
    e_scales: Any,
    g_scales: Any,
    u_gate: Any,
    u_up: Any,
    b_gate: Any,
    b_up: Any,
    a: Any,
    *,
    activation: str = "silu",
) -> str | None:
    """Of arrays, or of their shapes and dtypes."""
    return _BACKENDS[backend].refuses(e, (u_gate.shape[1], u_up.shape[1], a.shape[0]))


def _case(dtype: Any, *, rows: int, columns: int, ranks: tuple[int, int, int], **static: Any) -> Case:
    draw = np.random.default_rng(0)
    gate, up, down = ranks
    shapes = {"e": (rows, columns), "g": (rows, columns), "u_gate": (rows, gate), "u_up": (rows, up)}
    shapes |= {"b_gate": (columns, gate), "b_up": (columns, up), "a": (down, columns)}
    arrays = {name: jnp.asarray(draw.standard_normal(shape), dtype) for name, shape in shapes.items()}
    arrays |= {name: jnp.asarray(0.5 + draw.random(rows), jnp.float32) for name in ("e_scales", "g_scales")}
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
