"""The one entry to the backward of act(e + bias) with its adapters' sums, its reference, and its record."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.functions import PLAIN
from pallas_kernels.plain_gradients import triton, xla

_BACKENDS = {"triton": triton, "xla": xla}


def plain_gradients(
    e: Float[Array, "N F"],
    bias: Float[Array, "1 F"],
    dh: Float[Array, "N F"],
    u: Float[Array, "N Ru"],
    du: Float[Array, "N Rd"],
    *,
    update: tuple[Float[Array, " N"], Float[Array, "Rd F"]] | None = None,
    unadapted: tuple[Float[Array, " N"] | None, Float[Array, "F Ru"]] | None = None,
    activation: str,
    backend: str = "auto",
) -> tuple[Float[Array, "N F"], Float[Array, "F Ru"], Float[Array, "Rd F"]]:
    """(de, deᵀ u, duᵀ h) of h = act(e + bias) under the cotangent dh: de = dh ∘ act'(e + bias).

    These are the gradients by the first of an MLP's two projections, by the B of its adapter (u = A x) and by the A of the second one's
    (du = dy (s B)); `gated_gradients` is the same for an MLP with a gate. Products whose rows are scaled afterwards may come as they are:
    with ``update`` (fp32 scales, the second adapter's A) scales ∘ dh + du a is meant in dh's place, and with ``unadapted`` (fp32 scales
    or None, the first adapter's s·B) scales ∘ e + u bᵀ in e's. de comes in e's dtype, the sums over the rows in fp32, of values rounded to
    e's dtype. On a GPU a kernel reads e and dh once, writes nothing else that is wide, and keeps scales ∘ e + u bᵀ in fp32, where XLA
    rounds it.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1, 1))
    >>> [round(x.item(), 4) for x in plain_gradients(one, 0 * one, one, one, one, activation="gelu")]
    [1.0833, 1.0833, 0.8413]

    Raises:
      ValueError: shapes or dtypes disagree, or nobody knows the activation or the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    _check(e, bias, dh, (u, du), update, unadapted, activation)
    chosen = KERNEL.choose(backend, e, bias, dh, u, du, update=update, unadapted=unadapted, activation=activation)
    return _BACKENDS[chosen].gradients(e, bias, dh, u, du, update, unadapted, activation)


def reference(
    e: Array, bias: Array, dh: Array, u: Array, du: Array, *, update: Any = None, unadapted: Any = None, activation: str
) -> tuple[Array, ...]:
    """The arguments and results of `plain_gradients`, by autodiff of the definition; computed in fp32."""
    e32, bias32, dh32, u32, du32 = (x.astype(jnp.float32) for x in (e, bias, dh, u, du))
    if unadapted is not None:
        e32 = (1 if unadapted[0] is None else unadapted[0][:, None]) * e32 + u32 @ unadapted[1].astype(jnp.float32).T
    if update is not None:
        dh32 = update[0][:, None] * dh32 + du32 @ update[1].astype(jnp.float32)
    h, pull = jax.vjp(PLAIN[activation], e32 + bias32)
    (de,) = pull(dh32)
    return de.astype(e.dtype), de.T @ u32, du32.T @ h


def _check(e: Array, bias: Array, dh: Array, columns: tuple[Array, Array], update: Any, unadapted: Any, activation: str) -> None:
    faults = []
    if e.ndim != 2 or e.shape != dh.shape or bias.shape != (1, e.shape[-1]):
        faults.append(f"expected e and dh [N, F] and bias [1, F], got {e.shape}, {dh.shape} and {bias.shape}")
    wrong = [u.shape for u in columns if u.ndim != 2 or u.shape[0] != e.shape[0]]
    if wrong:
        faults.append(f"expected columns [{e.shape[0]}, R], got {', '.join(map(str, wrong))}")
    (u, du), given = columns, [pair for pair in (update, unadapted) if pair is not None]
    wrong = [s for s, _ in given if s is not None and (s.shape != e.shape[:1] or s.dtype != jnp.float32)]
    if wrong:
        faults.append(f"expected scales [{e.shape[0]}] in float32, got {', '.join(f'{s.shape} {s.dtype}' for s in wrong)}")
    if update is not None and update[1].shape != (du.shape[-1], e.shape[-1]):
        faults.append(f"expected a [{du.shape[-1]}, {e.shape[-1]}] with the scales of dh, got {update[1].shape}")
    if unadapted is not None and unadapted[1].shape != (e.shape[-1], u.shape[-1]):
        faults.append(f"expected b [{e.shape[-1]}, {u.shape[-1]}] of the adapter of e, got {unadapted[1].shape}")
    dtypes = {str(x.dtype) for x in (e, bias, dh, *columns, *(matrix for _, matrix in given))}
    if len(dtypes) > 1:
        faults.append(f"expected one dtype, got {', '.join(sorted(dtypes))}")
    if activation not in PLAIN:
        faults.append(f"activation must be one of {', '.join(PLAIN)}, got {activation!r}")
    if faults:
        raise ValueError("; ".join(faults))


def _refuses(backend: str, e: Any, bias: Any, dh: Any, u: Any, du: Any, **others: Any) -> str | None:
    """Of arrays, or of their shapes and dtypes."""
    return _BACKENDS[backend].refuses(e, (u.shape[1], du.shape[1]))


def _case(dtype: Any, *, rows: int, columns: int, ranks: tuple[int, int], update: bool = False, unadapted: str = "", **static: Any) -> Case:
    """``unadapted``: "unscaled" too, or "scaled" already."""
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(draw.standard_normal(shape), dtype)

    def row_scales() -> Array:
        return jnp.asarray(0.5 + draw.random(rows), jnp.float32)

    shapes = {"e": (rows, columns), "bias": (1, columns), "dh": (rows, columns), "u": (rows, ranks[0]), "du": (rows, ranks[1])}
    arrays: dict[str, Any] = {name: normal(*shape) for name, shape in shapes.items()}
    if update:
        arrays["update"] = row_scales(), normal(ranks[1], columns)
    if unadapted:
        arrays["unadapted"] = row_scales() if unadapted == "unscaled" else None, normal(columns, ranks[0])
    return Case(arrays=arrays, static=static, wrt=())


CASES = {
    "quick_gelu": functools.partial(_case, rows=256, columns=192, ranks=(16, 16), activation="quick_gelu"),
    "gelu": functools.partial(_case, rows=128, columns=64, ranks=(8, 8), activation="gelu"),
    "gelu_tanh": functools.partial(_case, rows=128, columns=128, ranks=(16, 16), activation="gelu_tanh"),
    "ragged_everywhere": functools.partial(_case, rows=173, columns=75, ranks=(5, 20), activation="quick_gelu"),
    "unscaled": functools.partial(_case, rows=256, columns=192, ranks=(16, 16), update=True, unadapted="unscaled", activation="quick_gelu"),
    "unadapted": functools.partial(_case, rows=256, columns=192, ranks=(16, 16), unadapted="scaled", activation="quick_gelu"),
    "ragged_update": functools.partial(_case, rows=173, columns=75, ranks=(5, 20), update=True, activation="gelu"),
    "ragged_unscaled": functools.partial(_case, rows=173, columns=75, ranks=(5, 20), unadapted="unscaled", activation="gelu_tanh"),
    "fewer_rows_than_parts": functools.partial(_case, rows=3, columns=80, ranks=(16, 4), activation="gelu"),
}

KERNEL = Kernel(
    name="plain_gradients",
    reference=reference,
    backends={name: functools.partial(plain_gradients, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases=CASES,
    # 16-bit: e + bias, h and de are rounded before they multiply.
    tolerance={"float32": 1e-5, "bfloat16": 1e-2},
)
