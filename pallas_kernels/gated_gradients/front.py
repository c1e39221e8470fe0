"""The one entry to the backward of act(e) ∘ g with its adapters' sums, its reference, and its record."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.gated_gradients import triton, xla
from pallas_kernels.lora_swiglu.activations import ACTIVATIONS

type Unadapted = Sequence[tuple[Float[Array, " N"] | None, Float[Array, "F _"]]]

_BACKENDS = {"triton": triton, "xla": xla}


def gated_gradients(
    e: Float[Array, "N F"],
    g: Float[Array, "N F"],
    dh: Float[Array, "N F"],
    u_gate: Float[Array, "N Rg"],
    u_up: Float[Array, "N Ru"],
    du: Float[Array, "N Rd"],
    a: Float[Array, "Rd F"],
    *,
    scales: Float[Array, " N"] | None = None,
    unadapted: Unadapted | None = None,
    activation: str = "silu",
    padding: int | None = None,
    backend: str = "auto",
) -> tuple[Array, ...]:
    """(de, dg, deᵀ u_gate, dgᵀ u_up, duᵀ h) of h = act(e) ∘ g under the cotangent t = scales ∘ dh + du a.

    de = t ∘ g ∘ act'(e) and dg = t ∘ act(e).

    These are the gradients by a gated MLP's two projections, by the B of their adapters (u = A x) and by the A of the adapter of the
    projection that follows, whose part of t comes as du = dy (s B) and its A, and what comes through its weight as dh, whose rows fp32
    ``scales`` multiply where it comes without them. So may e and g: ``unadapted`` are the fp32 scales of their rows (both's or neither's)
    and their adapters' s·B [F, R], and scales ∘ e + u bᵀ is then meant. de and dg come in e's dtype, the sums over the rows in fp32, of
    values rounded to e's dtype. With ``padding``, one array [de, dg, 0] with so many columns of zeros takes the place of both. On a GPU a
    kernel reads e, g and dh once, and writes nothing else that is wide: t, h, de and dg are not read again. What it makes in between stays
    in fp32, where XLA rounds scales ∘ e + u bᵀ and act(e).

    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1, 1))
    >>> [round(x.item(), 4) for x in gated_gradients(one, one, one, one, one, one, 0 * one)]
    [0.9277, 0.7311, 0.9277, 0.7311, 0.7311]

    Raises:
      ValueError: shapes or dtypes disagree, or nobody knows the activation or the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    _check(e, g, dh, (u_gate, u_up, du), a, scales, unadapted, activation)
    chosen = KERNEL.choose(backend, e, g, dh, u_gate, u_up, du, a, scales=scales, unadapted=unadapted, activation=activation)
    return _BACKENDS[chosen].gradients((e, g), dh, (u_gate, u_up), du, a, scales, unadapted, activation, padding)


def reference(
    e: Array,
    g: Array,
    dh: Array,
    u_gate: Array,
    u_up: Array,
    du: Array,
    a: Array,
    *,
    scales: Array | None = None,
    unadapted: Unadapted | None = None,
    activation: str = "silu",
    padding: int | None = None,
) -> tuple[Array, ...]:
    """The arguments and results of `gated_gradients`, by autodiff of the definition; computed in fp32."""
    e32, g32, dh32, u_gate32, u_up32, du32, a32 = (x.astype(jnp.float32) for x in (e, g, dh, u_gate, u_up, du, a))
    if unadapted is not None:
        (e_scales, b_gate), (g_scales, b_up) = unadapted
        e32 = (1 if e_scales is None else e_scales[:, None]) * e32 + u_gate32 @ b_gate.astype(jnp.float32).T
        g32 = (1 if g_scales is None else g_scales[:, None]) * g32 + u_up32 @ b_up.astype(jnp.float32).T
    h, pull = jax.vjp(lambda e, g: ACTIVATIONS[activation](e) * g, e32, g32)
    de, dg = pull((dh32 if scales is None else scales[:, None] * dh32) + du32 @ a32)
    wide = (de, dg) if padding is None else (jnp.pad(jnp.concatenate([de, dg], axis=1), ((0, 0), (0, padding))),)
    return *(dy.astype(e.dtype) for dy in wide), de.T @ u_gate32, dg.T @ u_up32, du32.T @ h


def _check(
    e: Array,
    g: Array,
    dh: Array,
    columns: tuple[Array, ...],
    a: Array,
    scales: Array | None,
    unadapted: Unadapted | None,
    activation: str,
) -> None:
    faults = []
    if e.ndim != 2 or not e.shape == g.shape == dh.shape:
        faults.append(f"expected e, g and dh [N, F], got {e.shape}, {g.shape} and {dh.shape}")
    wrong = [u.shape for u in columns if u.ndim != 2 or u.shape[0] != e.shape[0]]
    if wrong:
        faults.append(f"expected columns [{e.shape[0]}, R], got {', '.join(map(str, wrong))}")
    if a.shape != (columns[-1].shape[-1], e.shape[-1]):
        faults.append(f"expected a [{columns[-1].shape[-1]}, {e.shape[-1]}], got {list(a.shape)}")
    others = unadapted or ()
    wrong = [s for s in (scales, *(s for s, _ in others)) if s is not None and (s.shape != e.shape[:1] or s.dtype != jnp.float32)]
    if wrong:
        faults.append(f"expected scales [{e.shape[0]}] in float32, got {', '.join(f'{s.shape} {s.dtype}' for s in wrong)}")
    if len({s is None for s, _ in others}) > 1:
        faults.append("expected scales of both e and g or of neither, got those of one")
    bs = [b for _, b in others]
    if unadapted is not None and [b.shape for b in bs] != [(e.shape[-1], u.shape[-1]) for u in columns[:-1]]:
        faults.append(f"expected bs [{e.shape[-1]}, R] for each of {len(columns) - 1} products, got {', '.join(str(b.shape) for b in bs)}")
    dtypes = {str(x.dtype) for x in (e, g, dh, *columns, a, *bs)}
    if len(dtypes) > 1:
        faults.append(f"expected one dtype, got {', '.join(sorted(dtypes))}")
    if activation not in ACTIVATIONS:
        faults.append(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if faults:
        raise ValueError("; ".join(faults))


def _refuses(backend: str, e: Any, g: Any, dh: Any, u_gate: Any, u_up: Any, du: Any, a: Any, **others: Any) -> str | None:
    """Of arrays, or of their shapes and dtypes."""
    return _BACKENDS[backend].refuses(e, tuple(u.shape[1] for u in (u_gate, u_up, du)))


def _case(
    dtype: Any, *, rows: int, columns: int, ranks: tuple[int, int, int], scaled: bool = False, unadapted: str = "", **static: Any
) -> Case:
    """``unadapted``: "unscaled" too, or "scaled" already."""
    draw = np.random.default_rng(0)
    shapes = {name: (rows, columns) for name in ("e", "g", "dh")}
    shapes |= {name: (rows, rank) for name, rank in zip(("u_gate", "u_up", "du"), ranks, strict=True)} | {"a": (ranks[2], columns)}
    arrays: dict[str, Any] = {name: jnp.asarray(draw.standard_normal(s), dtype) for name, s in shapes.items()}

    def row_scales() -> Array:
        return jnp.asarray(0.5 + draw.random(rows), jnp.float32)

    if scaled:
        arrays["scales"] = row_scales()
    if unadapted:
        scales = [row_scales() if unadapted == "unscaled" else None for _ in range(2)]
        arrays["unadapted"] = tuple(
            (s, jnp.asarray(draw.standard_normal((columns, rank)), dtype)) for s, rank in zip(scales, ranks[:2], strict=True)
        )
    return Case(arrays=arrays, static=static, wrt=())


CASES = {
    "silu": functools.partial(_case, rows=256, columns=192, ranks=(16, 16, 16)),
    "gelu": functools.partial(_case, rows=128, columns=64, ranks=(8, 8, 8), activation="gelu"),
    "gelu_tanh": functools.partial(_case, rows=128, columns=128, ranks=(16, 16, 16), activation="gelu_tanh"),
    "ragged_everywhere": functools.partial(_case, rows=173, columns=75, ranks=(5, 3, 20)),
    "scaled": functools.partial(_case, rows=173, columns=128, ranks=(16, 16, 16), scaled=True),
    "unscaled": functools.partial(_case, rows=256, columns=192, ranks=(16, 16, 16), scaled=True, unadapted="unscaled"),
    "ragged_unscaled": functools.partial(_case, rows=173, columns=75, ranks=(5, 3, 20), unadapted="unscaled", activation="gelu"),
    "unadapted": functools.partial(_case, rows=256, columns=192, ranks=(16, 16, 16), unadapted="scaled"),
    "together": functools.partial(_case, rows=256, columns=192, ranks=(16, 16, 16), unadapted="scaled", padding=32),
    "ragged_together": functools.partial(_case, rows=173, columns=75, ranks=(5, 3, 20), padding=4),
    "fewer_rows_than_parts": functools.partial(_case, rows=3, columns=80, ranks=(16, 8, 4)),
}

KERNEL = Kernel(
    name="gated_gradients",
    reference=reference,
    backends={name: functools.partial(gated_gradients, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases=CASES,
    # 16-bit: act(e), h, de and dg are rounded before they multiply.
    tolerance={"float32": 1e-5, "bfloat16": 1e-2},
)
