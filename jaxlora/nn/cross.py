"""Cross-attention from text to vision states, gated, as Llama 3.2's decoder has it in every fifth layer."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxlora.nn.attention import LayerInputs, Shared, Vision
from jaxlora.nn.decoder import DecoderConfig
from jaxlora.nn.linear import Linear, project
from jaxlora.nn.mlp import SwiGLU, by_tiles
from jaxlora.nn.norm import RMSNorm, add, residual
from jaxlora.nn.tiles import gate
from jaxlora.typing import Array, Float
from jaxlora.weights.base import abstract
from pallas_kernels.attention import Intervals, attention


class CrossAttention(nnx.Module):
    """o(softmax(norm(q) norm(k)ᵀ / √C) v) with q of the tokens, k and v of the vision states that each sees; without positions."""

    def __init__(self, config: DecoderConfig, *, dtype: Any):
        heads, width = config.num_attention_heads, config.head_dim
        self.heads, self.head_dim = heads, width
        self.q_proj = Linear(config.hidden_size, heads * width, dtype=dtype)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * width, dtype=dtype)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * width, dtype=dtype)
        self.o_proj = Linear(heads * width, config.hidden_size, dtype=dtype)
        self.q_norm = RMSNorm(width, eps=config.rms_norm_eps, dtype=dtype)
        self.k_norm = RMSNorm(width, eps=config.rms_norm_eps, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B S D"], vision: Vision, layer: LayerInputs, backend: str
    ) -> tuple[Float[Array, "B S D"], tuple[Float[Array, "P V K C"], Float[Array, "P V K C"]]]:
        """Returns the output, and (k, v): those of ``layer.cache``, else of the vision states. A data shard's rows share its states."""
        B, S, _ = x.shape
        keys = layer.keys or {}
        k, v = self._keys_and_values(vision, keys) if layer.cache is None else layer.cache
        shards = k.shape[0]
        q = self.q_norm(self.q_proj(x, keys.get("q_proj")).reshape(shards, -1, self.heads, self.head_dim))
        starts = vision.starts.reshape(shards, -1)
        seen = Intervals(starts, starts + jnp.abs(vision.lengths).reshape(shards, -1))
        y = attention(q, k, v, segments=seen, causal=False, backend=backend)
        return self.o_proj(y.reshape(B, S, -1), keys.get("o_proj")), (k, v)

    def _keys_and_values(self, vision: Vision, keys: Any) -> tuple[Float[Array, "P V K C"], Float[Array, "P V K C"]]:
        assert vision.states is not None, "there are neither images nor what a layer kept of them"
        k, v = project((self.k_proj, self.v_proj), vision.states, [keys.get("k_proj"), keys.get("v_proj")])
        k, v = (t.reshape(*t.shape[:2], -1, self.head_dim) for t in (k, v))
        return self.k_norm(k), v


class CrossLayer(nnx.Module):
    """h += tanh(g) · cross_attn(norm(h)); h += tanh(g') · mlp(norm(h)), at tokens that see an image; others stay as they are."""

    def __init__(self, config: DecoderConfig, *, dtype: Any):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.cross_attn = CrossAttention(config, dtype=dtype)
        self.cross_attn_attn_gate: nnx.Param[Any] = nnx.Param(abstract((1,), dtype))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, dtype=dtype)
        self.cross_attn_mlp_gate: nnx.Param[Any] = nnx.Param(abstract((1,), dtype))

    def __call__(self, x: Float[Array, "B S D"], shared: Shared, layer: LayerInputs) -> tuple[Float[Array, "B S D"], Any]:
        """Returns the state and, in generation, the keys and values of the vision states."""
        vision = shared.vision
        if vision is None:
            return x, layer.cache
        # A token that sees nothing gets exactly zero from attention.
        attended, cache = self.cross_attn(self.input_layernorm(x), vision, layer, shared.backend)
        x = residual(x, gate(self.cross_attn_attn_gate, x.dtype) * attended)
        y = by_tiles(lambda h: self.mlp(self.post_attention_layernorm(h), layer.keys), x, None if layer.keys else shared.mlp_tile)
        y = jnp.where((vision.lengths > 0)[..., None], y, jnp.zeros((), y.dtype))
        return add(x, gate(self.cross_attn_mlp_gate, x.dtype) * y), None if shared.column is None else cache
