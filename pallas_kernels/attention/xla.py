"""Attention in plain XLA: blockwise with an online softmax, in any dtype, on any platform.

The equations are those of FlashAttention-2 (Dao 2023, arXiv:2307.08691). With s = cap(scale * q k^T), visible keys only, and an optional
sink:

    m = max s,  l = sum exp(s - m) [+ exp(sink - m)],  out = sum exp(s - m) v / l,  lse = m + log l
    p = exp(s - lse),  delta = sum_c dout * out,  ds = p * (dout v^T - delta) * cap'(s) * scale
    dv = p^T dout,  dk = ds^T q,  dq = ds k,  dsink = -sum exp(sink - lse) * delta

Memory is O(S * block); a pair of blocks that no segment joins (or that the causal or window bound separates, in every row) is never
visited.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.spec import MASKED, KeyValue, Query, Reach, Segments, Spec, key_ranges

LARGEST_BLOCK = 512
_TILE_ELEMENTS = 2**24

# A loop counts with an int under `jax.disable_jit`.
type Index = Int[Array, ""] | int
type State = tuple[Array, Array, Array]
type Seen = tuple[Int[Array, "*n B q"], Int[Array, "*n B q"]]


def refuses(
    spec: Spec, q: Query, k: KeyValue, sinks: Float[Array, " H"] | None, reach: Reach, segments: Segments | None = None
) -> str | None:
    """Nothing is refused: every other backend falls back to this one."""
    return None


@functools.partial(jax.jit, static_argnames="spec")
def attention_forward(
    spec: Spec, q: Query, k: KeyValue, v: KeyValue, sinks: Float[Array, " H"] | None, segments: Segments, reach: Reach = None
) -> tuple[Float[Array, "B S H C"], Float[Array, "B H S"]]:
    """The output in q's dtype, and the f32 log-sum-exp (0 where a query sees nothing and there is no sink)."""
    queries, keys = _blocks(q, k)
    qs, ks, vs = _query_heads(queries, q, k.shape[2]), _heads(keys, k), _heads(keys, v)
    seen, visits = _visits(spec, q.shape[1], queries, keys, segments, reach)

    def query_block(_: None, block: tuple[Array, Seen, tuple[Array, Array]]) -> tuple[None, tuple[Array, Array]]:
        qi, seen_i, (first, last) = block

        def key_block(j: Index, state: State) -> State:
            return _add_keys(_within(spec), qi, keys.at(ks, j), keys.at(vs, j), seen_i, j * keys.size, state)

        m, total, acc = keys.loop(first, last, key_block, (*_initial(sinks, qi.shape[:4]), jnp.zeros(qi.shape, jnp.float32)))
        alive = total > 0
        total = jnp.where(alive, total, 1.0)
        return None, ((acc / total[..., None]).astype(q.dtype), jnp.where(alive, m + jnp.log(total), 0.0))

    _, (out, lse) = queries.scan(query_block, None, (qs, seen, _ranges(visits)))
    return _without_blocks(out, q), jnp.moveaxis(lse, 0, 3).reshape(q.shape[0], q.shape[2], -1)[:, :, : q.shape[1]]


@functools.partial(jax.jit, static_argnames="spec")
def attention_backward(
    spec: Spec,
    q: Query,
    k: KeyValue,
    v: KeyValue,
    sinks: Float[Array, " H"] | None,
    segments: Segments,
    saved: tuple[Float[Array, "B S H C"], Float[Array, "B H S"]],
    dout: Query,
    reach: Reach = None,
) -> tuple[Query, KeyValue, KeyValue, Float[Array, " H"] | None]:
    """dq, dk, dv and dsinks in the dtypes of q, k, v and sinks; ``saved`` is what the forward pass returned.

    One sweep: key blocks outside, query blocks inside, dq accumulated in an f32 buffer of q's shape.
    """
    (queries, keys), heads = _blocks(q, k), k.shape[2]
    out, lse = saved
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [B, S, H]
    dsinks = None
    if sinks is not None:
        weight = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse)
        dsinks = -jnp.einsum("bhs,bsh->h", weight, delta).astype(sinks.dtype)
    seen, visits = _visits(spec, q.shape[1], queries, keys, segments, reach)
    lse, delta = (_query_heads(queries, x[..., None], heads)[..., 0] for x in (jnp.moveaxis(lse, 2, 1), delta))
    rows = _query_heads(queries, q, heads), _query_heads(queries, dout, heads), lse, delta, seen

    def key_block(dq: Array, block: tuple[Index, Array, Array, tuple[Array, Array]]) -> tuple[Array, tuple[Array, Array]]:
        j, kj, vj, (first, last) = block

        def query_block(i: Index, state: State) -> State:
            dq, dk, dv = state
            dq_i, dk_i, dv_i = _pair_gradient(_within(spec), *queries.at(rows, i), kj, vj, j * keys.size)
            return queries.add(dq, i, dq_i), dk + dk_i, dv + dv_i

        zero = jnp.zeros(kj.shape, jnp.float32)
        dq, dk, dv = queries.loop(first, last, query_block, (dq, zero, zero))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    blocks = jnp.arange(keys.count, dtype=jnp.int32), _heads(keys, k), _heads(keys, v), _ranges(visits.T)
    dq, (dk, dv) = keys.scan(key_block, jnp.zeros(rows[0].shape, jnp.float32), blocks)
    return _without_blocks(dq, q).astype(q.dtype), _without_blocks(dk, k), _without_blocks(dv, v), dsinks


def _within(spec: Spec) -> Spec:
    """The options that matter once each query's keys are known. Calls that differ in the others alone, as self- and cross-attention do,
    share what a pair of blocks is computed by."""
    return dataclasses.replace(spec, causal=False, window=None)


@functools.partial(jax.jit, static_argnames="spec")
def _add_keys(
    spec: Spec,
    q: Float[Array, "B K G q C"],
    k: Float[Array, "B K t C"],
    v: Float[Array, "B K t C"],
    seen: Seen,
    start: Index,
    state: State,
) -> State:
    """The running maximum, sum and output of a block of queries after a block of keys, the first of which is key ``start``."""
    m, total, acc = state
    logits, visible, _ = _logits(spec, q, k, seen, start)
    m_new = jnp.maximum(m, jnp.max(jnp.where(visible, logits, MASKED), axis=-1))
    p = jnp.where(visible, jnp.exp(logits - m_new[..., None]), 0.0)
    rescale = jnp.exp(m - m_new)
    pv = jnp.einsum("bkgqt,bktc->bkgqc", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return m_new, total * rescale + jnp.sum(p, axis=-1), acc * rescale[..., None] + pv


@functools.partial(jax.jit, static_argnames="spec")
def _pair_gradient(
    spec: Spec,
    q: Float[Array, "B K G q C"],
    dout: Float[Array, "B K G q C"],
    lse: Float[Array, "B K G q"],
    delta: Float[Array, "B K G q"],
    seen: Seen,
    k: Float[Array, "B K t C"],
    v: Float[Array, "B K t C"],
    start: Index,
) -> tuple[Float[Array, "B K G q C"], Float[Array, "B K t C"], Float[Array, "B K t C"]]:
    """What a block of queries and a block of keys, the first of which is key ``start``, add to dq, dk and dv."""
    logits, visible, slope = _logits(spec, q, k, seen, start)
    p = jnp.where(visible, jnp.exp(logits - lse[..., None]), 0.0)
    dp = jnp.einsum("bkgqc,bktc->bkgqt", dout, v, preferred_element_type=jnp.float32)
    ds = (p * (dp - delta[..., None]) * slope).astype(q.dtype)
    dv = jnp.einsum("bkgqt,bkgqc->bktc", p.astype(dout.dtype), dout, preferred_element_type=jnp.float32)
    dk = jnp.einsum("bkgqt,bkgqc->bktc", ds, q, preferred_element_type=jnp.float32)
    return jnp.einsum("bkgqt,bktc->bkgqc", ds, k, preferred_element_type=jnp.float32), dk, dv


def _logits(
    spec: Spec, q: Float[Array, "B K G q C"], k: Float[Array, "B K t C"], seen: Seen, start: Index
) -> tuple[Float[Array, "B K G q t"], Bool[Array, "B 1 1 q t"], Float[Array, "B K G q t"] | float]:
    """The capped logits, which of them count, and their derivative by q k^T."""
    key = (start + jnp.arange(k.shape[2], dtype=jnp.int32))[None, None, None, None, :]
    lo, hi = (bound[:, None, None, :, None] for bound in seen)
    visible = (key >= lo) & (key < hi)
    logits = jnp.einsum("bkgqc,bktc->bkgqt", q, k, preferred_element_type=jnp.float32) * spec.scale
    if spec.softcap is None:
        return logits, visible, spec.scale
    bent = jnp.tanh(logits / spec.softcap)
    return spec.softcap * bent, visible, spec.scale * (1.0 - bent * bent)


def _initial(sinks: Float[Array, " H"] | None, shape: tuple[int, ...]) -> tuple[Float[Array, "B K G q"], Float[Array, "B K G q"]]:
    """The running maximum and sum before any key: a sink is a logit that was already seen."""
    if sinks is None:
        return jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    sinks = sinks.astype(jnp.float32).reshape(1, shape[1], shape[2], 1)
    return jnp.broadcast_to(sinks, shape), jnp.ones(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """An axis cut into ``count`` blocks of ``size``; with a single block every loop below is a plain call, which is quick to trace and
    compile."""

    size: int
    count: int

    def cut(self, x: Array, axis: int) -> Array:
        """[..., S, ...] -> [..., count, size, ...], with padding at the end."""
        missing = self.size * self.count - x.shape[axis]
        padded = jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)]) if missing else x
        return padded.reshape(*x.shape[:axis], self.count, self.size, *x.shape[axis + 1 :])

    def at[T](self, blocks: T, i: Index) -> T:
        """A block of each of these arrays, whose first axis is that of the blocks."""
        if self.count == 1:
            return jax.tree.map(lambda x: x[0], blocks)
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False, allow_negative_indices=False), blocks)

    def add(self, blocks: Float[Array, "n B K G q C"], i: Index, block: Float[Array, "B K G q C"]) -> Float[Array, "n B K G q C"]:
        if self.count == 1:
            return blocks + block[None]
        return lax.dynamic_update_index_in_dim(blocks, self.at(blocks, i) + block, i, 0, allow_negative_indices=False)

    def loop[T](self, first: Array, last: Array, body: Callable[[Index, T], T], state: T) -> T:
        return body(jnp.zeros((), jnp.int32), state) if self.count == 1 else lax.fori_loop(first, last, body, state)

    def scan[C, X, T](self, body: Callable[[C, X], tuple[C, T]], carry: C, blocks: X) -> tuple[C, T]:
        if self.count > 1:
            return lax.scan(body, carry, blocks)
        carry, result = body(carry, self.at(blocks, 0))
        return carry, jax.tree.map(lambda x: x[None], result)


def _blocks(q: Query, k: KeyValue) -> tuple[_Blocks, _Blocks]:
    """The blocks of queries and of keys. A tile of f32 logits stays within 64 MiB, however many rows and heads there are."""
    largest = LARGEST_BLOCK
    while q.shape[0] * q.shape[2] * largest * largest > _TILE_ELEMENTS and largest > 64:
        largest //= 2

    def cut(length: int) -> _Blocks:
        size = min(largest, length)
        return _Blocks(size, -(-length // size))

    return cut(q.shape[1]), cut(k.shape[1])


def _heads(blocks: _Blocks, x: Float[Array, "B S H C"]) -> Float[Array, "n B H s C"]:
    return blocks.cut(x, 1).transpose(1, 0, 3, 2, 4)


def _query_heads(queries: _Blocks, x: Float[Array, "B S H C"], kv_heads: int) -> Float[Array, "n B K G q C"]:
    x = _heads(queries, x)
    return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])


def _without_blocks(x: Float[Array, "n B *heads s C"], like: Float[Array, "B S H C"]) -> Float[Array, "B S H C"]:
    """The inverse of `_heads` and of `_query_heads`, in x's dtype."""
    x = x.reshape(*x.shape[:2], -1, *x.shape[-2:]).transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : like.shape[1]]


@functools.partial(jax.jit, static_argnames=("spec", "length", "queries", "keys"))
def _visits(spec: Spec, length: int, queries: _Blocks, keys: _Blocks, segments: Segments, reach: Reach) -> tuple[Seen, Bool[Array, "n m"]]:
    """The keys lo <= j < hi that each query sees, in blocks, and whether some row has a query in block n that may see a key in block m."""
    lo, hi = (jnp.moveaxis(queries.cut(bound, 1), 1, 0) for bound in key_ranges(spec, segments, length, reach))
    sees = hi > lo
    lowest = jnp.min(jnp.where(sees, lo, keys.size * keys.count), axis=(1, 2))
    highest = jnp.max(jnp.where(sees, hi, 0), axis=(1, 2))
    edges = keys.size * jnp.arange(keys.count + 1, dtype=jnp.int32)
    return (lo, hi), (lowest[:, None] < edges[None, 1:]) & (highest[:, None] > edges[None, :-1])


@jax.jit
def _ranges(visits: Bool[Array, "n m"]) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """For each row, the first column that is True and the one after the last; m and 0 where none is."""
    column = jnp.arange(visits.shape[1], dtype=jnp.int32)[None]
    return jnp.min(jnp.where(visits, column, visits.shape[1]), axis=1), jnp.max(jnp.where(visits, column + 1, 0), axis=1)
