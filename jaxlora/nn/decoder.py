"""The decoder that the Llama and Gemma families share."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from conversion.hf_config import Rope
from jaxlora.nn import rope
from jaxlora.nn.attention import Attention, AttentionConfig, LayerInputs, Segments, Shared, Vision
from jaxlora.nn.embed import Embed, features_at
from jaxlora.nn.linear import Linear
from jaxlora.nn.mlp import GeGLU, SwiGLU, by_tiles
from jaxlora.nn.norm import CentredRMSNorm, RMSNorm, add, branch, residual
from jaxlora.nn.scan import Scan
from jaxlora.nn.stack import Stack
from jaxlora.typing import Array, Float, Int, PRNGKeyArray
from jaxlora.weights.base import AbstractWeight
from jaxlora.weights.lora import LoRA
from pallas_kernels.attention import cover


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder's sizes in Hugging Face's words. ``windows`` holds a sliding window (or None) for each layer.

    ``local_rope`` turns the layers with a window, where it differs from ``rope``. Gemma's: ``centred_norms`` scale by 1 + w, ``post_norms``
    follow attention and MLP, ``scaled_embeddings`` are multiplied by √hidden_size.
    """

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
    hidden_act: str = "silu"
    local_rope: Rope | None = None
    centred_norms: bool = False
    post_norms: bool = False
    scaled_embeddings: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    deepstack_layers: int = 0

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
            centred_norms=self.centred_norms,
            scale=None if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar**-0.5,
            softcap=self.attn_logit_softcapping,
        )


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a forward pass runs; never what it computes.

    ``scan`` is how the layers' blocks are recomputed, unrolled and offloaded; ``attention`` names a backend; adapters drop out only where
    ``dropout_key`` is given. ``mlp_tile`` is how many tokens the decoder's MLPs take at a time (`by_tiles`), ``loss_chunk`` how many the
    loss does (`pallas_kernels.linear_cross_entropy`).
    """

    attention: str = "auto"
    scan: Scan = Scan()
    mlp_tile: int | None = None
    loss_chunk: int = 512
    dropout_key: PRNGKeyArray | None = None


class DecoderLayer(nnx.Module):
    """h += attn(norm(h)); h += mlp(norm(h))."""

    def __init__(self, config: DecoderConfig, *, window: int | None, dtype: Any):
        norm = _norms(config, dtype)
        self.input_layernorm = norm()
        self.self_attn = Attention(config.attention, window=window, dtype=dtype)
        self.post_attention_layernorm = norm()
        self.mlp = _mlp(config, dtype)

    def __call__(self, x: Float[Array, "B S D"], shared: Shared, layer: LayerInputs) -> tuple[Float[Array, "B S D"], Any]:
        """Returns the state and, in generation, the layer's cache."""
        x, normed = branch(self.input_layernorm, x, self.self_attn.inputs, layer.keys)
        attended, cache = self.self_attn(normed, shared, layer)

        def mlp(h: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
            h, normed = branch(self.post_attention_layernorm, h, self.mlp.inputs, layer.keys)
            return add(h, self.mlp(normed, layer.keys))

        return by_tiles(mlp, residual(x, attended), _tile(shared, layer)), cache


class DeepstackLayer(DecoderLayer):
    """A layer to whose output vision features of its own are added (Meng et al. 2024, arXiv:2406.04334)."""

    def __call__(self, x: Float[Array, "B S D"], shared: Shared, layer: LayerInputs) -> tuple[Float[Array, "B S D"], Any]:
        """Returns the state and, in generation, the layer's cache; without images it is a layer like any other."""
        x, cache = super().__call__(x, shared, layer)
        if shared.deepstack is not None:
            features, index = shared.deepstack
            x = x + features_at(index, features[layer.number]).astype(x.dtype)
        return x, cache


class SandwichLayer(nnx.Module):
    """h += norm(attn(norm(h))); h += norm(mlp(norm(h))): here ``post_attention_layernorm`` norms what attention adds (Gemma 2 and 3)."""

    def __init__(self, config: DecoderConfig, *, window: int | None, dtype: Any):
        norm = _norms(config, dtype)
        self.input_layernorm = norm()
        self.self_attn = Attention(config.attention, window=window, dtype=dtype)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = _mlp(config, dtype)
        self.post_feedforward_layernorm = norm()

    def __call__(self, x: Float[Array, "B S D"], shared: Shared, layer: LayerInputs) -> tuple[Float[Array, "B S D"], Any]:
        """Returns the state and, in generation, the layer's cache."""
        x, normed = branch(self.input_layernorm, x, self.self_attn.inputs, layer.keys)
        attended, cache = self.self_attn(normed, shared, layer)

        def mlp(h: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
            h, normed = branch(self.pre_feedforward_layernorm, h, self.mlp.inputs, layer.keys)
            return add(h, self.post_feedforward_layernorm(self.mlp(normed, layer.keys)))

        return by_tiles(mlp, residual(x, self.post_attention_layernorm(attended)), _tile(shared, layer)), cache


class Extra(TypedDict, total=False):
    """What some models' layers see beside the rest, as ``Shared`` has it."""

    deepstack: tuple[Float[Array, "N P F D"], Int[Array, "B S"]] | None
    vision: Vision | None


class Decoder(nnx.Module):
    """Embedding, layers and final norm; the head belongs to the model. ``blocks`` are an architecture's own layers, if it has any."""

    def __init__(self, config: DecoderConfig, *, path: str, blocks: Sequence[nnx.Module] | None = None, dtype: Any):
        self.config = config
        scale = config.hidden_size**0.5 if config.scaled_embeddings else None
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, scale=scale, dtype=dtype)
        plain = SandwichLayer if config.post_norms else DecoderLayer
        kinds = [DeepstackLayer if i < config.deepstack_layers else plain for i in range(config.num_hidden_layers)]
        own = [layer(config, window=window, dtype=dtype) for layer, window in zip(kinds, config.windows, strict=True)]
        self.layers = Stack(own if blocks is None else blocks, path=f"{path}.layers")
        self.norm = _norms(config, dtype)()

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "*kinds B S"],
        segments: Segments,
        execution: Execution,
        *,
        caches: Any = None,
        column: Int[Array, " B"] | None = None,
        reach: Int[Array, "B S"] | None = None,
        **extra: Unpack[Extra],
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Embedded tokens to normed hidden states; ``caches`` are (k, v) [L, B, T, K, C], written from ``column`` on (generation).

        Where layers cache different things, ``caches`` is a dict of one cache for each key of the stack. ``reach`` lets some tokens see
        ahead, as ``attention`` has it; ``extra`` are fields of ``Shared``.
        """
        shared = dataclasses.replace(self.shared(positions, segments, x.dtype, execution, column, reach), **extra)
        key = execution.dropout_key
        numbers = None if extra.get("deepstack") is None else jnp.arange(self.config.num_hidden_layers)
        layers = LayerInputs(keys=None if key is None else self.layers.dropout_keys(key), cache=caches, number=numbers)
        if isinstance(caches, dict):
            layers = {name: LayerInputs(cache=cache) for name, cache in caches.items()}
        x, _, outs = self.layers(x, shared, layers, scan=execution.scan)
        return self.norm(x), outs

    def shared(
        self,
        positions: Int[Array, "*kinds B S"],
        segments: Segments,
        dtype: Any,
        execution: Execution = Execution(),
        column: Int[Array, " B"] | None = None,
        reach: Int[Array, "B S"] | None = None,
    ) -> Shared:
        """What every layer sees; positions are [B, S], or [3, B, S] for M-RoPE."""
        local = None if self.config.local_rope is None else rope.text_table(positions, self.config.head_dim, self.config.local_rope, dtype)
        covering = cover(segments, positions.shape[-1])
        table = self.rope_table(positions, dtype)
        return Shared(table, covering, execution.attention, column, local, reach, mlp_tile=execution.mlp_tile)

    def rope_table(self, positions: Int[Array, "*kinds B S"], dtype: Any) -> rope.Table:
        """cos and sin for the positions, [B, S] or [3, B, S] (M-RoPE)."""
        return rope.text_table(positions, self.config.head_dim, self.config.rope, dtype)


def _tile(shared: Shared, layer: LayerInputs) -> int | None:
    """Tokens a tile of an MLP; none where a Linear drops, whose mask is one for all tokens."""
    return None if layer.keys else shared.mlp_tile


def _norms(config: DecoderConfig, dtype: Any) -> Callable[[], RMSNorm | CentredRMSNorm]:
    norm = CentredRMSNorm if config.centred_norms else RMSNorm
    return functools.partial(norm, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)


def _mlp(config: DecoderConfig, dtype: Any) -> SwiGLU | GeGLU:
    mlp = {"silu": SwiGLU, "gelu_pytorch_tanh": GeGLU}[config.hidden_act]
    return mlp(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, dtype=dtype)


class Head:
    """The output head as a value: logits = cap(x·Wᵀ (+ s·x·Aᵀ·Bᵀ)), cap(t) = softcap · tanh(t / softcap) where there is one."""

    def __init__(self, weight: AbstractWeight, lora: LoRA | None, softcap: float | None = None):
        self.weight, self.lora, self.softcap = weight, lora, softcap

    def logits(self, hidden: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Logits in fp32."""
        x = hidden.reshape(-1, hidden.shape[-1])
        weight = self.weight.dequantise().astype(x.dtype)
        out = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        if self.lora is not None:
            out = out + ((x @ self.lora.a.T.astype(x.dtype)) @ (self.lora.scale * self.lora.b).T.astype(x.dtype)).astype(jnp.float32)
        if self.softcap is not None:
            out = self.softcap * jnp.tanh(out / self.softcap)
        return out.reshape(*hidden.shape[:-1], -1)


def head_of(lm_head: Linear, embed: Embed, softcap: float | None = None) -> Head:
    """The head's own weight, or the embedding's table where they are tied."""
    return Head(embed.table if lm_head.weight is None else lm_head.weight.get_value(), lm_head.lora, softcap)
