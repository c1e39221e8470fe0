"""The contract of attention: dense, f32, obvious."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.spec import Alike, Intervals, KeyValue, Query, Reach, Segments


def reference(
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
) -> Float[Array, "B S H C"]:
    """The arguments and result of `attention`, by the definition; builds [B, H, S, T]. ``longest`` changes nothing."""
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k32, v32 = (jnp.repeat(x, groups, axis=2) for x in (k32, v32))
    logits = jnp.einsum("bshc,bthc->bhst", q32, k32) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if isinstance(segments, Alike):
        length = q.shape[1] // segments.count
        starts = jnp.broadcast_to(length * jnp.arange(segments.count), (q.shape[0], segments.count))
        segments = starts, jnp.full_like(starts, length)
    if isinstance(segments, Intervals):
        key = jnp.arange(k.shape[1])[None, None, :]
        visible = (key >= segments.starts[..., None]) & (key < segments.ends[..., None])
    else:
        visible = _visible(segments, q.shape[1], causal, window, reach)
    visible = visible[:, None]
    logits = jnp.where(visible, logits, -jnp.inf)
    sink = jnp.full(q.shape[2], -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    sink = jnp.broadcast_to(sink[None, :, None, None], (*logits.shape[:3], 1))
    # A row that sees nothing has no softmax: give it one finite logit, then drop it.
    alive = jnp.any(visible, axis=-1, keepdims=True)
    weights = jax.nn.softmax(jnp.concatenate([jnp.where(alive, logits, 0.0), sink], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bhst,bthc->bshc", jnp.where(alive, weights, 0.0), v32).astype(q.dtype)


def segment_ids(segments: Segments, length: int) -> Int[Array, "B S"]:
    """The index of the segment of each position, -1 for none.

    >>> import jax.numpy as jnp
    >>> segment_ids((jnp.array([[0, 2, 0]]), jnp.array([[2, 3, 0]])), 6).tolist()
    [[0, 0, 1, 1, 1, -1]]
    """
    position = jnp.arange(length)
    ids = jnp.full((segments[0].shape[0], length), -1)
    for m in range(segments[0].shape[1]):
        start, count = segments[0][:, m, None], segments[1][:, m, None]
        ids = jnp.where((position[None] >= start) & (position[None] < start + count), m, ids)
    return ids


def _visible(segments: Segments, length: int, causal: bool, window: int | None, reach: Reach) -> Bool[Array, "B S T"]:
    ids = segment_ids(segments, length)
    i, j = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    visible = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
    if causal:
        visible &= (j <= i)[None] if reach is None else (j <= i)[None] | (j[None] < reach[:, :, None])
    if window is not None:
        visible &= (j > i - window)[None]
    return visible
