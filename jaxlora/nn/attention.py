"""Self-attention with grouped heads, over packed rows or over a cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlora.nn.linear import Linear, project
from jaxlora.nn.norm import CentredRMSNorm, RMSNorm
from jaxlora.nn.pending import Pending
from jaxlora.nn.rope import Table, rotate
from jaxlora.typing import Array, Float, Int
from pallas_kernels.attention import Alike, attention

type Segments = tuple[Int[Array, "B M"], Int[Array, "B M"]]


@dataclasses.dataclass(frozen=True)
class Shared:
    """What every layer of a stack sees: the rotary table, the segments of each row and, in generation, where the cache is written.

    ``segments`` are (starts, lengths) [B, M]; ``backend`` names an attention backend ("auto" chooses). ``column`` is None in training; in
    generation it is the cache column of each row's first query: 0 for a prompt, whose rows begin at column 0. Layers with a sliding window
    turn by ``local_rope`` where there is one. ``reach`` lets tokens see ahead, as ``attention`` has it. ``deepstack`` are features
    [N, P, F, D], one set for each of the first N layers, and where they belong, as ``features_at`` has it. ``vision`` is what
    cross-attention layers attend to; without it they are skipped. ``mlp_tile``: tokens that an MLP takes at a time.
    """

    rope: Table
    segments: Segments | Alike
    backend: str = "auto"
    column: Int[Array, " B"] | None = None
    local_rope: Table | None = None
    reach: Int[Array, "B S"] | None = None
    deepstack: tuple[Float[Array, "N P F D"], Int[Array, "B S"]] | None = None
    vision: "Vision | None" = None
    mlp_tile: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vision:
    """Projected vision states of P data shards (None in generation after the prompt), and which of them each token sees.

    Token (b, s) sees ``lengths[b, s]`` states of its shard from ``starts[b, s]`` on. 0: it sees no image, and cross-attention layers leave
    it as it is. A negative length is transformers' rule for such a token: it attends to that many states, but the layer's MLP is left out.
    """

    states: Float[Array, "P V D"] | None
    starts: Int[Array, "B S"]
    lengths: Int[Array, "B S"]


class Attention(nnx.Module):
    """o(softmax(cap(scale · q kᵀ)) v), causal inside each segment, optionally within a sliding window and with q/k norms."""

    def __init__(self, config: "AttentionConfig", *, window: int | None = None, dtype: Any = jnp.bfloat16):
        self.config = config
        self.window = window
        c = config
        self.q_proj = Linear(c.hidden_size, c.heads * c.head_dim, bias=c.qkv_bias, dtype=dtype)
        self.k_proj = Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=c.qkv_bias, dtype=dtype)
        self.v_proj = Linear(c.hidden_size, c.kv_heads * c.head_dim, bias=c.qkv_bias, dtype=dtype)
        self.o_proj = Linear(c.heads * c.head_dim, c.hidden_size, bias=c.o_bias, dtype=dtype)
        norm = CentredRMSNorm if c.centred_norms else RMSNorm
        self.q_norm = nnx.data(norm(c.head_dim, eps=c.qk_norm_eps, dtype=dtype) if c.qk_norm_eps else None)
        self.k_norm = nnx.data(norm(c.head_dim, eps=c.qk_norm_eps, dtype=dtype) if c.qk_norm_eps else None)

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The Linears that take its input."""
        return (self.q_proj, self.k_proj, self.v_proj)

    def __call__(self, x: Float[Array, "B S D"] | Pending, shared: Shared, layer: "LayerInputs") -> tuple[Float[Array, "B S D"], Any]:
        """Returns the output and, in generation, the updated (k, v) cache."""
        B, S, _ = x.shape
        keys = layer.keys
        c = self.config
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v = project((self.q_proj, self.k_proj, self.v_proj), x, None if keys is None else [keys.get(n) for n in names])
        q, k, v = (t.reshape(B, S, -1, c.head_dim) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = kept_heads(q, k, v, name="unnormed")
            q, k = self.q_norm(q), self.k_norm(k)
        table = shared.rope if self.window is None or shared.local_rope is None else shared.local_rope
        q, k = rotate(q, table), rotate(k, table)
        if self.q_norm is None:
            q, k, v = kept_heads(q, k, v)
        cache = layer.cache
        if cache is not None and shared.column is not None:
            cache = tuple(_write(old, new, shared.column) for old, new in zip(cache, (k, v), strict=True))
        if cache is not None and S == 1:
            y = _attend_cache(q, cache, shared, self.window, c)
        else:
            options = {"window": self.window, "scale": c.scale, "softcap": c.softcap, "backend": shared.backend}
            y = attention(q, k, v, segments=shared.segments, causal=True, reach=shared.reach, **options)
        return self.o_proj(y.reshape(B, S, -1), None if keys is None else keys.get("o_proj")), cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes of an attention layer; ``qk_norm_eps`` None means no q/k norms, ``scale`` None head_dim^-½, ``softcap`` None no cap."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm_eps: float | None = None
    centred_norms: bool = False
    scale: float | None = None
    softcap: float | None = None

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"num_attention_heads={self.heads} must be a multiple of num_key_value_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs of channels")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What one layer gets of its own: dropout keys by Linear name, its (k, v) cache [B, T, K, C], its number; None where unused."""

    keys: dict[str, Any] | None = None
    cache: Any = None
    number: Any = None


def kept_heads(*qkv: Float[Array, "B S _ C"], name: str = "qkv") -> tuple[Float[Array, "B S _ C"], ...]:
    """Turned queries and keys, and values, for the policies that keep them in place of the products that they come from.

    Where a norm comes between, its backward needs what it took all the same: "unnormed", for policies that do not keep the products.
    """
    return tuple(checkpoint_name(t, name) for t in qkv)


def _write(cache: Float[Array, "B T K C"], new: Float[Array, "B S K C"], column: Int[Array, " B"]) -> Float[Array, "B T K C"]:
    if new.shape[1] > 1:
        return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), 0, axis=1)
    return cache.at[jnp.arange(cache.shape[0]), column].set(new[:, 0].astype(cache.dtype))


def _attend_cache(
    q: Float[Array, "B 1 H C"], cache: Any, shared: Shared, window: int | None, config: AttentionConfig
) -> Float[Array, "B 1 H C"]:
    """One query a row over the filled part of its (k, v) cache [B, T, K, C]; softmax in fp32."""
    k, v = cache
    B, _, H, C = q.shape
    T, K = k.shape[1:3]
    columns, last = jnp.arange(T)[None], jnp.asarray(shared.column)[:, None]
    visible = columns <= last
    if window is not None:
        visible &= columns > last - window
    grouped = q.reshape(B, K, H // K, C)
    scores = jnp.einsum("bkgc,btkc->bkgt", grouped, k, preferred_element_type=jnp.float32)
    scores *= C**-0.5 if config.scale is None else config.scale
    if config.softcap is not None:
        scores = config.softcap * jnp.tanh(scores / config.softcap)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgt,btkc->bkgc", weights.astype(v.dtype), v).reshape(B, 1, H, C)
