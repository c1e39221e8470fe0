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

from pallas_kernels.attention.spec import KeyValue, Query, Reach, Segments, Spec, key_ranges

# Finite, so that the difference of two masked logits is 0 and not NaN.
_MASKED = -1e30
_LARGEST_BLOCK = 512
_TILE_ELEMENTS = 2**24

# A loop counts with an int under `jax.disable_jit`.
type Index = Int[Array, ""] | int


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
    lo, hi = (queries.pad(x, axis=1) for x in key_ranges(spec, segments, q.shape[1], reach))
    first, last = _block_ranges(_joined(queries, keys, lo, hi))
    qh, kh, vh = _query_heads(queries, q, k.shape[2]), _key_heads(keys, k), _key_heads(keys, v)
    shape = (*qh.shape[:3], queries.block)

    def query_block(i: Index) -> tuple[Array, Array]:
        qi, lo_i, hi_i = queries.take(qh, i, 3), queries.take(lo, i, 1), queries.take(hi, i, 1)

        def key_block(j: Index, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            m, total, acc = state
            vj = keys.take(vh, j, 2)
            logits, visible, _ = _logits(spec, qi, keys.take(kh, j, 2), _visible(keys, lo_i, hi_i, j))
            m_new = jnp.maximum(m, jnp.max(jnp.where(visible, logits, _MASKED), axis=-1))
            p = jnp.where(visible, jnp.exp(logits - m_new[..., None]), 0.0)
            rescale = jnp.exp(m - m_new)
            pv = jnp.einsum("bkgqt,bktc->bkgqc", p.astype(vj.dtype), vj, preferred_element_type=jnp.float32)
            return m_new, total * rescale + jnp.sum(p, axis=-1), acc * rescale[..., None] + pv

        m, total = _initial(sinks, shape)
        m, total, acc = keys.loop(first[i], last[i], key_block, (m, total, jnp.zeros((*shape, q.shape[3]), jnp.float32)))
        alive = total > 0
        total = jnp.where(alive, total, 1.0)
        return (acc / total[..., None]).astype(q.dtype), jnp.where(alive, m + jnp.log(total), 0.0)

    out, lse = queries.map(query_block)
    out = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(q.shape[0], -1, *q.shape[2:])[:, : q.shape[1]]
    lse = jnp.moveaxis(lse, 0, 3).reshape(q.shape[0], q.shape[2], -1)[:, :, : q.shape[1]]
    return out, lse


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
    lo, hi = (queries.pad(x, axis=1) for x in key_ranges(spec, segments, q.shape[1], reach))
    first, last = _block_ranges(_joined(queries, keys, lo, hi).T)
    qh, douth, kh, vh = *(_query_heads(queries, x, heads) for x in (q, dout)), *(_key_heads(keys, x) for x in (k, v))
    lse = queries.pad(lse, axis=2).reshape(qh.shape[:4])
    delta = _query_heads(queries, delta[..., None], heads)[..., 0]

    def key_block(dq: Array, j: Index) -> tuple[Array, tuple[Array, Array]]:
        kj, vj = keys.take(kh, j, 2), keys.take(vh, j, 2)

        def query_block(i: Index, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = state
            qi, dout_i = queries.take(qh, i, 3), queries.take(douth, i, 3)
            lse_i, delta_i = queries.take(lse, i, 3), queries.take(delta, i, 3)
            logits, visible, slope = _logits(spec, qi, kj, _visible(keys, queries.take(lo, i, 1), queries.take(hi, i, 1), j))
            p = jnp.where(visible, jnp.exp(logits - lse_i[..., None]), 0.0)
            dp = jnp.einsum("bkgqc,bktc->bkgqt", dout_i, vj, preferred_element_type=jnp.float32)
            ds = (p * (dp - delta_i[..., None]) * slope).astype(qi.dtype)
            dv += jnp.einsum("bkgqt,bkgqc->bktc", p.astype(dout_i.dtype), dout_i, preferred_element_type=jnp.float32)
            dk += jnp.einsum("bkgqt,bkgqc->bktc", ds, qi, preferred_element_type=jnp.float32)
            return queries.add(dq, i, jnp.einsum("bkgqt,bktc->bkgqc", ds, kj, preferred_element_type=jnp.float32)), dk, dv

        zero = jnp.zeros(kj.shape, jnp.float32)
        dq, dk, dv = queries.loop(first[j], last[j], query_block, (dq, zero, zero))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = keys.scan(key_block, jnp.zeros(qh.shape, jnp.float32))
    dq = jnp.moveaxis(dq, 3, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, : q.shape[1]].astype(q.dtype)
    dk, dv = (jnp.moveaxis(x, (0, 3), (1, 2)).reshape(k.shape[0], -1, *k.shape[2:])[:, : k.shape[1]] for x in (dk, dv))
    return dq, dk, dv, dsinks


def _logits(
    spec: Spec, q: Float[Array, "B K G q C"], k: Float[Array, "B K t C"], visible: Bool[Array, "B 1 1 q t"]
) -> tuple[Float[Array, "B K G q t"], Bool[Array, "B 1 1 q t"], Float[Array, "B K G q t"] | float]:
    """The capped logits, which of them count, and their derivative by q k^T."""
    logits = jnp.einsum("bkgqc,bktc->bkgqt", q, k, preferred_element_type=jnp.float32) * spec.scale
    if spec.softcap is None:
        return logits, visible, spec.scale
    bent = jnp.tanh(logits / spec.softcap)
    return spec.softcap * bent, visible, spec.scale * (1.0 - bent * bent)


def _initial(sinks: Float[Array, " H"] | None, shape: tuple[int, ...]) -> tuple[Float[Array, "B K G q"], Float[Array, "B K G q"]]:
    """The running maximum and sum before any key: a sink is a logit that was already seen."""
    if sinks is None:
        return jnp.full(shape, _MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    sinks = sinks.astype(jnp.float32).reshape(1, shape[1], shape[2], 1)
    return jnp.broadcast_to(sinks, shape), jnp.ones(shape, jnp.float32)


def _block_ranges(joined: Bool[Array, "n m"]) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """For each row, the first column that is True and the one after the last; equal where none is."""
    count = joined.shape[1]
    any_joined = jnp.any(joined, axis=1)
    last = jnp.where(any_joined, count - jnp.argmax(joined[:, ::-1], axis=1), 0)
    return jnp.where(any_joined, jnp.argmax(joined, axis=1), 0), last


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """An axis cut into ``count`` blocks; with a single block every loop below is a plain call, which is quick to trace and compile."""

    block: int
    count: int

    def pad(self, x: Array, axis: int) -> Array:
        missing = self.block * self.count - x.shape[axis]
        return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)]) if missing else x

    def take(self, x: Array, i: Index, axis: int) -> Array:
        return x if self.count == 1 else lax.dynamic_slice_in_dim(x, i * self.block, self.block, axis)

    def add(self, x: Float[Array, "B K G s C"], i: Index, block: Float[Array, "B K G q C"]) -> Float[Array, "B K G s C"]:
        return x + block if self.count == 1 else lax.dynamic_update_slice_in_dim(x, self.take(x, i, 3) + block, i * self.block, 3)

    def loop[T](self, first: Array, last: Array, body: Callable[[Index, T], T], state: T) -> T:
        return body(jnp.zeros((), jnp.int32), state) if self.count == 1 else lax.fori_loop(first, last, body, state)

    def map[T](self, body: Callable[[Index], T]) -> T:
        """``body`` of every block index, results stacked on a new first axis."""
        return self.scan(lambda _, i: (None, body(i)), None)[1]

    def scan[C, T](self, body: Callable[[C, Index], tuple[C, T]], carry: C) -> tuple[C, T]:
        if self.count > 1:
            return lax.scan(body, carry, jnp.arange(self.count))
        carry, result = body(carry, jnp.zeros((), jnp.int32))
        return carry, jax.tree.map(lambda x: x[None], result)


def _blocks(q: Query, k: KeyValue) -> tuple[_Blocks, _Blocks]:
    """The blocks of queries and of keys. A tile of f32 logits stays within 64 MiB, however many rows and heads there are."""
    largest = _LARGEST_BLOCK
    while q.shape[0] * q.shape[2] * largest * largest > _TILE_ELEMENTS and largest > 64:
        largest //= 2

    def cut(length: int) -> _Blocks:
        block = min(largest, length)
        return _Blocks(block, -(-length // block))

    return cut(q.shape[1]), cut(k.shape[1])


def _query_heads(queries: _Blocks, x: Float[Array, "B S H C"], kv_heads: int) -> Float[Array, "B K G s C"]:
    batch, _, heads, width = x.shape
    return jnp.moveaxis(queries.pad(x, axis=1), 1, 2).reshape(batch, kv_heads, heads // kv_heads, -1, width)


def _key_heads(keys: _Blocks, x: KeyValue) -> Float[Array, "B K t C"]:
    return jnp.moveaxis(keys.pad(x, axis=1), 1, 2)


def _visible(keys: _Blocks, lo: Int[Array, "B q"], hi: Int[Array, "B q"], j: Index) -> Bool[Array, "B 1 1 q t"]:
    key = (j * keys.block + jnp.arange(keys.block))[None, None, None, None, :]
    lo, hi = lo[:, None, None, :, None], hi[:, None, None, :, None]
    return (key >= lo) & (key < hi)


def _joined(queries: _Blocks, keys: _Blocks, lo: Int[Array, "B s"], hi: Int[Array, "B s"]) -> Bool[Array, "n m"]:
    """[i, j]: some row has a query in block i whose interval may reach key block j."""
    sees = hi > lo
    lowest = jnp.min(jnp.where(sees, lo, keys.block * keys.count).reshape(-1, queries.count, queries.block), axis=(0, 2))
    highest = jnp.max(jnp.where(sees, hi, 0).reshape(-1, queries.count, queries.block), axis=(0, 2))
    edges = keys.block * jnp.arange(keys.count + 1)
    return (lowest[:, None] < edges[None, 1:]) & (highest[:, None] > edges[None, :-1])
