"""The one entry to attention, its custom VJP, and its record."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels._kernel import Kernel
from pallas_kernels.attention import cudnn, short, xla
from pallas_kernels.attention.cases import CASES
from pallas_kernels.attention.reference import reference
from pallas_kernels.attention.spec import Alike, Covering, Intervals, KeyValue, Query, Reach, Segments, Spec

_BACKENDS = {"cudnn": cudnn, "xla": xla, "short": short}


def attention(
    q: Query,
    k: KeyValue,
    v: KeyValue,
    *,
    segments: Segments | Alike,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    reach: Reach = None,
    longest: int | None = None,
    backend: str = "auto",
) -> Float[Array, "B S H C"]:
    """Softmax attention inside the segments of packed rows: out_i = sum_j p_ij v_j, p_i = softmax_j(cap(scale * q_i k_j)).

    Query i sees key j when both are in the same segment, j <= i if ``causal``, and j > i - ``window`` if there is one. Query head h reads
    key head h // (H // K). ``segments`` is (starts, lengths), int32, in tokens, contiguous and disjoint within a row; an unused entry has
    length 0. A position in no segment gives exactly zero and takes no gradient; `cover` leaves none, which is faster, and `Alike` says that
    all have one length, which is faster still.
    cap(s) = softcap * tanh(s / softcap). ``sinks`` are one more logit a head, neither scaled nor capped, that takes part in the softmax and
    has no value. ``scale`` is C**-0.5 unless given. ``reach`` (int32) lifts causality up to a key: query i also sees the keys j < reach_i
    of its segment. Tokens of an image that see each other both ways have the image's end there, all others 0. ``longest`` promises that no
    segment has more tokens; if it is small, each is a dense attention of its own ("short"), where a broken promise gives NaN.

    Cross-attention, and masks that are no segments, give `Intervals` as ``segments``: query i then sees the keys starts_i <= j < ends_i
    (none: exactly zero), whatever their number T.

    Softmax in f32; products in the dtype of q, accumulated in f32; the result in q's dtype. Under `jax.checkpoint` a policy that saves the
    names "attn_out" and "attn_lse" keeps the backward pass from running the forward attention again.

    >>> import jax.numpy as jnp
    >>> v = jnp.array([2.0, 4.0, 9.0]).reshape(1, 3, 1, 1)
    >>> segments = (jnp.array([[0, 2]]), jnp.array([[2, 1]]))
    >>> attention(jnp.zeros_like(v), v, v, segments=segments, causal=True).ravel().tolist()
    [2.0, 3.0, 9.0]

    Raises:
      ValueError: dtypes or shapes disagree, an option is out of range, or nobody knows the backend.
      NotImplementedError: the named backend cannot run this call; the text says why.
    """
    options = {"causal": causal, "scale": scale, "window": window, "softcap": softcap, "longest": longest}
    if isinstance(segments, Alike):
        if reach is not None:
            raise ValueError("reach lifts causality up to a key of the whole row; of segments alike it must be None")
        rows, whole = _apart(q, k, v, segments.count)
        return attention(*rows, segments=whole, sinks=sinks, backend=backend, **options).reshape(q.shape)
    _check(q, k, v, segments, causal, window, reach, longest)
    if backend == "auto" and longest is not None and _refuses("short", q, k, v, segments=segments, sinks=sinks, **options) is None:
        backend = "short"
    chosen = KERNEL.choose(backend, q, k, v, segments=segments, sinks=sinks, reach=reach, **options)
    # Lowering for a GPU that this host does not have runs nothing, so there is nothing to check.
    if chosen == "cudnn" and jax.default_backend() == "gpu":
        cudnn.check_packing()
    return _attention(chosen, _spec(q, **options), q, k, v, sinks, segments, reach)


def _apart(q: Query, k: KeyValue, v: KeyValue, count: int) -> tuple[tuple[Array, ...], Covering]:
    """The ``count`` segments of each row as rows of their own."""
    if k.shape[:2] != q.shape[:2] or count < 1 or q.shape[1] % count:
        raise ValueError(f"segments alike are equal parts of rows of queries and of keys, got {count} of q {q.shape} and k {k.shape}")
    rows, length = q.shape[0] * count, q.shape[1] // count
    whole = Covering(jnp.zeros((rows, 1), jnp.int32), jnp.full((rows, 1), length, jnp.int32))
    return (q.reshape(rows, length, *q.shape[2:]), k.reshape(rows, length, *k.shape[2:]), v.reshape(rows, length, *v.shape[2:])), whole


def _spec(q: Query, *, causal: bool, scale: float | None = None, window: int | None = None, **options: Any) -> Spec:
    # A window that no row can leave is no window, and more backends run without one.
    window = None if window is not None and window >= q.shape[1] else window
    return Spec(causal=causal, scale=q.shape[3] ** -0.5 if scale is None else scale, window=window, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    backend: str, spec: Spec, q: Query, k: KeyValue, v: KeyValue, sinks: Float[Array, " H"] | None, segments: Segments, reach: Reach
) -> Float[Array, "B S H C"]:
    return _BACKENDS[backend].attention_forward(spec, q, k, v, sinks, segments, reach)[0]


def _forward(backend, spec, q, k, v, sinks, segments, reach):
    # Without this, a scan over layers takes what depends on the segments alone out of the call, and stores it: masks, even blocks of zeros.
    whole = jax.checkpoint(_BACKENDS[backend].attention_forward, prevent_cse=False, static_argnums=0)
    out, lse = whole(spec, q, k, v, sinks, segments, reach)
    out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
    return out, (q, k, v, sinks, segments, reach, out, lse)


def _backward(backend, spec, residuals, dout):
    q, k, v, sinks, segments, reach, out, lse = residuals
    return *_BACKENDS[backend].attention_backward(spec, q, k, v, sinks, segments, (out, lse), dout, reach), None, None


_attention.defvjp(_forward, _backward)


def _check(
    q: Query, k: KeyValue, v: KeyValue, segments: Segments, causal: bool, window: int | None, reach: Reach, longest: int | None
) -> None:
    faults, intervals = [], isinstance(segments, Intervals)
    same = 1 if intervals else 2
    if k.shape != v.shape or q.shape[:same] != k.shape[:same] or q.shape[3] != k.shape[3]:
        faults.append(f"expected q [B, S, H, C] and k, v [B, S, K, C], got {q.shape}, {k.shape}, {v.shape}")
    elif q.shape[2] % k.shape[2]:
        faults.append(f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key heads; were q and k swapped?")
    if not q.dtype == k.dtype == v.dtype:
        faults.append(f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}; was one left in float32 by a norm or by RoPE?")
    starts, lengths = segments
    if intervals:
        if starts.shape != q.shape[:2] or lengths.shape != q.shape[:2]:
            faults.append(f"intervals must be two arrays [B, S] = {q.shape[:2]}, got {starts.shape} and {lengths.shape}")
        if causal or (window, longest) != (None, None):
            off = f"causal, window and longest must be off, got {causal}, {window} and {longest}"
            faults.append(f"intervals are all that a query sees: {off}")
    elif starts.shape != lengths.shape or starts.shape[:1] != q.shape[:1]:
        faults.append(f"segments must be two arrays [B={q.shape[0]}, M], got {starts.shape} and {lengths.shape}")
    if reach is not None and (not causal or reach.shape != q.shape[:2]):
        faults.append(f"reach lifts causality for single tokens: it needs causal=True and shape {q.shape[:2]}, got {causal}, {reach.shape}")
    if faults:
        raise ValueError("; ".join(faults))


def _refuses(
    backend: str,
    q: Query,
    k: KeyValue,
    v: KeyValue,
    *,
    segments: Segments | Alike,
    sinks: Float[Array, " H"] | None = None,
    reach: Reach = None,
    **options: Any,
) -> str | None:
    if isinstance(segments, Alike):
        (q, k, v), segments = _apart(q, k, v, segments.count)
    return _BACKENDS[backend].refuses(_spec(q, **options), q, k, sinks, reach, segments)


KERNEL = Kernel(
    name="attention",
    reference=reference,
    backends={name: functools.partial(attention, backend=name) for name in _BACKENDS},
    refuses=_refuses,
    cases=CASES,
    # 16-bit: the weights p and ds are rounded to the input dtype before their products (measured on CPU: at most half of these).
    tolerance={"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3},
)
