"""Attention inside segments of at most L tokens, such as the windows of a vision tower: each is a small dense attention.

The M segments of a row are gathered into [B · M, L]; logits are [B · M, H, L, L], however long the row is. Segments are disjoint, so that
what goes back to its token is a gather too, forward and backward.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.spec import MASKED, Intervals, KeyValue, Query, Reach, Segments, Spec, key_ranges

# Of longer segments, the square of logits is more than other backends need.
_LONGEST = 128


class _Places(NamedTuple):
    """``tokens``: the row's position of each place of a segment; ``filled``: whether there is one; ``places``: the place of each position
    of the row, ``inside`` whether it has one; ``visible``: whether a place sees another one of its segment."""

    tokens: Int[Array, "B N"]
    filled: Bool[Array, "B N"]
    places: Int[Array, "B S"]
    inside: Bool[Array, "B S"]
    visible: Bool[Array, "b 1 L L"]


def refuses(
    spec: Spec, q: Query, k: KeyValue, sinks: Float[Array, " H"] | None, reach: Reach, segments: Segments | None = None
) -> str | None:
    """Why this call cannot run in short segments, or None."""
    if spec.longest is None:
        return "needs to know that segments are short"
    if spec.longest > _LONGEST:
        return f"takes segments of at most {_LONGEST} tokens, got {spec.longest}"
    if spec.softcap is not None:
        return "has no soft-cap"
    return None if sinks is None else "has no sinks"


@functools.partial(jax.jit, static_argnames="spec")
def attention_forward(
    spec: Spec, q: Query, k: KeyValue, v: KeyValue, sinks: None, segments: Segments, reach: Reach = None
) -> tuple[Float[Array, "B S H C"], Float[Array, " 0"]]:
    """The output in q's dtype. The backward needs no statistics: it makes the weights again."""
    at = _places(spec, q.shape[1], segments, reach)
    q, k, v = (_gather(at, x) for x in (q, k, v))
    weights = _weights(_scale(spec, segments), at.visible, q, k)
    out = jnp.einsum("bkgqt,btkc->bqkgc", weights.astype(v.dtype), v)
    return _scatter(at, out.reshape(q.shape)), jnp.zeros(0, jnp.float32)


@functools.partial(jax.jit, static_argnames="spec")
def attention_backward(
    spec: Spec,
    q: Query,
    k: KeyValue,
    v: KeyValue,
    sinks: None,
    segments: Segments,
    saved: tuple[Float[Array, "B S H C"], Float[Array, " 0"]],
    dout: Query,
    reach: Reach = None,
) -> tuple[Query, KeyValue, KeyValue, None]:
    """dq, dk, dv and no dsinks."""
    at = _places(spec, q.shape[1], segments, reach)
    q, k, v, dout = (_gather(at, x) for x in (q, k, v, dout))
    scale = _scale(spec, segments)
    weights = _weights(scale, at.visible, q, k)
    q, dout = (_grouped(x, k.shape[2]) for x in (q, dout))
    dweights = jnp.einsum("bqkgc,btkc->bkgqt", dout, v, preferred_element_type=jnp.float32)
    dlogits = weights * (dweights - jnp.sum(weights * dweights, axis=-1, keepdims=True)) * scale
    weights, dlogits = weights.astype(v.dtype), dlogits.astype(q.dtype)
    dq = jnp.einsum("bkgqt,btkc->bqkgc", dlogits, k)
    dk = jnp.einsum("bkgqt,bqkgc->btkc", dlogits, q)
    dv = jnp.einsum("bkgqt,bqkgc->btkc", weights, dout)
    dq = dq.reshape(*dq.shape[:2], -1, dq.shape[4])
    dq, dk, dv = (_scatter(at, x) for x in (dq, dk, dv))
    return dq, dk, dv, None


def _scale(spec: Spec, segments: Segments) -> Float[Array, ""]:
    """The scale; NaN where a segment is longer than was promised, since part of it would be missing and nobody would know."""
    assert spec.longest is not None
    return jnp.where(jnp.any(segments[1] > spec.longest), jnp.nan, spec.scale)


def _places(spec: Spec, length: int, segments: Segments, reach: Reach) -> _Places:
    assert spec.longest is not None and not isinstance(segments, Intervals)
    starts, lengths = segments
    (B, M), L = starts.shape, min(spec.longest, length)
    offset = jnp.arange(L, dtype=jnp.int32)[None, None]
    # An unused segment starts anywhere; what is read there is dropped.
    tokens = jnp.minimum(starts[:, :, None] + offset, length - 1).reshape(B, M * L)
    filled = (offset < lengths[:, :, None]).reshape(B, M * L)

    position = jnp.arange(length, dtype=jnp.int32)[None, None]
    holds = (position >= starts[:, :, None]) & (position < (starts + lengths)[:, :, None])
    first = jnp.arange(M, dtype=jnp.int32)[None, :, None] * L - starts[:, :, None]
    places = jnp.sum(jnp.where(holds, first + position, 0), axis=1)

    lo, hi = (jnp.take_along_axis(bound, tokens, axis=1).reshape(B * M, 1, L, 1) for bound in key_ranges(spec, segments, length, reach))
    key = tokens.reshape(B * M, 1, 1, L)
    visible = (key >= lo) & (key < hi) & filled.reshape(B * M, 1, 1, L)
    return _Places(tokens, filled, places, jnp.any(holds, axis=1), visible)


def _gather(at: _Places, x: Float[Array, "B S A C"]) -> Float[Array, "b L A C"]:
    """[B, S, ...] -> [B · M, L, ...], zero where no token is."""
    found = jnp.take_along_axis(x, at.tokens[:, :, None, None], axis=1)
    found = jnp.where(at.filled[:, :, None, None], found, jnp.zeros((), x.dtype))
    return found.reshape(at.visible.shape[0], at.visible.shape[2], *x.shape[2:])


def _scatter(at: _Places, x: Float[Array, "b L A C"]) -> Float[Array, "B S A C"]:
    """The inverse of `_gather`, zero at positions in no segment."""
    flat = x.reshape(at.tokens.shape[0], -1, *x.shape[2:])
    found = jnp.take_along_axis(flat, at.places[:, :, None, None], axis=1)
    return jnp.where(at.inside[:, :, None, None], found, jnp.zeros((), x.dtype))


def _grouped(x: Float[Array, "b L H C"], kv_heads: int) -> Float[Array, "b L K G C"]:
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3])


def _weights(
    scale: Float[Array, ""], visible: Bool[Array, "b 1 L L"], q: Float[Array, "b L H C"], k: Float[Array, "b L K C"]
) -> Float[Array, "b K G L L"]:
    """The softmax, in f32."""
    logits = jnp.einsum("bqkgc,btkc->bkgqt", _grouped(q, k.shape[2]), k, preferred_element_type=jnp.float32) * scale
    return jax.nn.softmax(jnp.where(visible[:, :, None], logits, MASKED), axis=-1)
