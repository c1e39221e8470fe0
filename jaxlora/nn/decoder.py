"""The pre-norm decoder that the Llama family shares."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from conversion.hf_config import Rope
from jaxlora.nn import rope
from jaxlora.nn.attention import Attention, AttentionConfig, LayerInputs, Segments, Shared
from jaxlora.nn.embed import Embed
from jaxlora.nn.linear import Linear
from jaxlora.nn.mlp import SwiGLU
from jaxlora.nn.norm import RMSNorm
from jaxlora.nn.stack import Remat, Stack
from jaxlora.typing import Array, Float, Int, PRNGKeyArray
from jaxlora.weights.base import AbstractWeight
from jaxlora.weights.lora import LoRA


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder's sizes in Hugging Face's words. ``windows`` holds a sliding window (or None) for each layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def num_hidden_layers(self) -> int:
        """L."""
        return len(self.windows)

    @property
    def mrope_section(self) -> tuple[int, ...] | None:
        """Frequencies a position kind (time, height, width), where positions are three-dimensional."""
        return self.rope.mrope_section

    @property
    def attention(self) -> AttentionConfig:
        """The attention layer's sizes."""
        return AttentionConfig(
            hidden_size=self.hidden_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            qk_norm_eps=self.rms_norm_eps if self.qk_norm else None,
        )


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a forward pass runs; never what it computes.

    ``checkpoint`` recomputes blocks in the backward but for what the policy ``remat`` saves; ``attention`` names a backend;
    adapters drop out only where ``dropout_key`` is given.
    """

    attention: str = "auto"
    checkpoint: bool = False
    remat: Remat = None
    dropout_key: PRNGKeyArray | None = None


class DecoderLayer(nnx.Module):
    """h += attn(norm(h)); h += mlp(norm(h))."""

    def __init__(self, config: DecoderConfig, *, window: int | None, dtype: Any):
        norm = functools.partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.input_layernorm = norm()
        self.self_attn = Attention(config.attention, window=window, dtype=dtype)
        self.post_attention_layernorm = norm()
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, dtype=dtype)

    def __call__(self, x: Float[Array, "B S D"], shared: Shared, layer: LayerInputs) -> tuple[Float[Array, "B S D"], Any]:
        """Returns the state and, in generation, the layer's cache."""
        attended, cache = self.self_attn(self.input_layernorm(x), shared, layer)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x), layer.keys), cache


class Decoder(nnx.Module):
    """Embedding, layers and final norm; the head belongs to the model."""

    def __init__(self, config: DecoderConfig, *, path: str, dtype: Any):
        self.config = config
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = Stack([DecoderLayer(config, window=window, dtype=dtype) for window in config.windows], path=f"{path}.layers")
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "*kinds B S"],
        segments: Segments,
        execution: Execution,
        *,
        caches: Any = None,
        column: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Embedded tokens to normed hidden states; ``caches`` are (k, v) [L, B, T, K, C], written from ``column`` on (generation)."""
        shared = Shared(self.rope_table(positions, x.dtype), segments, execution.attention, column)
        key = execution.dropout_key
        layers = LayerInputs(keys=None if key is None else self.layers.dropout_keys(key), cache=caches)
        x, _, outs = self.layers(x, shared, layers, remat=execution.remat, checkpoint=execution.checkpoint)
        return self.norm(x), outs

    def rope_table(self, positions: Int[Array, "*kinds B S"], dtype: Any) -> rope.Table:
        """cos and sin for the positions, [B, S] or [3, B, S] (M-RoPE)."""
        inverse = rope.frequencies(self.config.head_dim, self.config.rope)
        section = self.config.mrope_section
        if section is None:
            return rope.table(positions, inverse, dtype)
        return rope.mrope_table(positions, inverse, section, dtype)


class Head:
    """The output head as a value: logits = x·Wᵀ (+ s·x·Aᵀ·Bᵀ)."""

    def __init__(self, weight: AbstractWeight, lora: LoRA | None):
        self.weight, self.lora = weight, lora

    def logits(self, hidden: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Logits in fp32."""
        x = hidden.reshape(-1, hidden.shape[-1])
        weight = self.weight.dequantise().astype(x.dtype)
        out = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        if self.lora is not None:
            out = out + ((x @ self.lora.a.T.astype(x.dtype)) @ (self.lora.scale * self.lora.b).T.astype(x.dtype)).astype(jnp.float32)
        return out.reshape(*hidden.shape[:-1], -1)


def head_of(lm_head: Linear, embed: Embed) -> Head:
    """The head's own weight, or the embedding's table where they are tied."""
    return Head(embed.table if lm_head.weight is None else lm_head.weight.get_value(), lm_head.lora)
