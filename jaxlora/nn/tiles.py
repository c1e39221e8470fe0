"""Llama 3.2's vision tower (Llama Team 2024, arXiv:2407.21783, section 7): an image is up to T tiles, which attend to each other.

The sequence of an image is all T tiles of P + 1 tokens each (a class token and P patches), also those that the image does not fill, and
then the padding that rounds each tile's tokens up to a multiple of 8. As in training, tokens see everything, padding included; padding
(of tiles, and tiles that the image does not fill) sees all but padding.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from jaxlora.data.batches import Batch
from jaxlora.errors import raise_all
from jaxlora.nn.attention import LayerInputs
from jaxlora.nn.decoder import Execution
from jaxlora.nn.embed import Embed
from jaxlora.nn.linear import Linear, project
from jaxlora.nn.mlp import PlainMLP
from jaxlora.nn.norm import LayerNorm, add, branch, residual
from jaxlora.nn.pending import Pending
from jaxlora.nn.stack import Stack
from jaxlora.nn.vision import PatchProjection
from jaxlora.typing import Array, Float, Int, PRNGKeyArray
from jaxlora.weights.base import abstract
from pallas_kernels.attention import Intervals, attention

# Tokens of a tile are padded to a multiple of this.
_ALIGNMENT = 8
_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class TilesConfig:
    """A tower's sizes in Hugging Face's words; ``aspect_ratios`` are (tiles high, tiles wide) of ids 1, 2, …

    ``intermediate_layers`` are the layers whose states are features too: those that enter them, which is what the weights were trained
    with, or with ``compat`` "hf5" those that leave them, as transformers 4.50 to 5 has it.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_global_layers: int
    attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    norm_eps: float
    max_num_tiles: int
    intermediate_layers: tuple[int, ...]
    aspect_ratios: tuple[tuple[int, int], ...]
    compat: Literal["reference", "hf5"] = "reference"

    def __post_init__(self):
        faults = [
            f"layer {i} is to be collected, of {self.num_hidden_layers}" for i in self.intermediate_layers if i >= self.num_hidden_layers
        ]
        faults += [
            f"aspect ratio {r} has more than {self.max_num_tiles} tiles" for r in self.aspect_ratios if math.prod(r) > self.max_num_tiles
        ]
        if not self.intermediate_layers:
            faults.append("no layer is to be collected: intermediate_layers_indices is empty")
        if self.hidden_size % self.attention_heads:
            faults.append(f"hidden_size={self.hidden_size} must be a multiple of attention_heads={self.attention_heads}")
        if self.image_size % self.patch_size:
            faults.append(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        elif self.padding == 0:
            faults.append(f"{self.patches} patches and a class token need no padding, for which transformers masks everything")
        raise_all("the vision tower's sizes do not fit together", faults)

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def padding(self) -> int:
        """Padding of a tile, in tokens."""
        return -(self.patches + 1) % _ALIGNMENT

    @property
    def features(self) -> int:
        """Width of a token's features: the last state and the intermediate ones."""
        return self.hidden_size * (len(self.intermediate_layers) + 1)

    @property
    def collected(self) -> tuple[int, ...]:
        """The layers whose inputs are the intermediate states."""
        return tuple(i + (self.compat == "hf5") for i in self.intermediate_layers)


class TileEmbedding(nnx.Module):
    """x + tanh(gate) · e[aspect ratio, tile]."""

    def __init__(self, config: TilesConfig, *, dtype: Any):
        self.tiles = config.max_num_tiles
        self.embedding = Embed(len(config.aspect_ratios) + 1, config.max_num_tiles * config.hidden_size, dtype=dtype)
        self.gate: nnx.Param[Any] = nnx.Param(abstract((1,), dtype))

    def __call__(self, ratios: Int[Array, " N"], dtype: Any) -> Float[Array, "N T 1 D"]:
        """What is added to each tile of images of these aspect ratios."""
        return gate(self.gate, dtype) * self.embedding(ratios).astype(dtype).reshape(ratios.shape[0], self.tiles, 1, -1)


class PositionEmbedding(nnx.Module):
    """(1 - tanh(gate)) · e[token] + tanh(gate) · t[aspect ratio, tile, token]."""

    def __init__(self, config: TilesConfig, *, dtype: Any):
        tokens = config.patches + 1
        self.shape = (config.max_num_tiles, tokens, config.hidden_size)
        self.embedding: nnx.Param[Any] = nnx.Param(abstract((tokens, config.hidden_size), dtype))
        self.tile_embedding = Embed(len(config.aspect_ratios) + 1, math.prod(self.shape), dtype=dtype)
        self.gate: nnx.Param[Any] = nnx.Param(abstract((1,), dtype))

    def __call__(self, ratios: Int[Array, " N"], dtype: Any) -> Float[Array, "N T n D"]:
        """What is added to the tokens of each tile of images of these aspect ratios."""
        g = gate(self.gate, dtype)
        tiles = self.tile_embedding(ratios).astype(dtype).reshape(ratios.shape[0], *self.shape)
        return (1 - g) * self.embedding.get_value().astype(dtype)[None, None] + g * tiles


@dataclasses.dataclass(frozen=True)
class TilesShared:
    """What every layer sees: the keys of each token of an image, and the attention backend."""

    seen: Intervals
    backend: str = "auto"


class TilesAttention(nnx.Module):
    """o(softmax(q kᵀ / √C) v) among the tokens of an image, without biases."""

    def __init__(self, config: TilesConfig, *, dtype: Any):
        self.heads = config.attention_heads
        width = config.hidden_size
        self.q_proj = Linear(width, width, dtype=dtype)
        self.k_proj = Linear(width, width, dtype=dtype)
        self.v_proj = Linear(width, width, dtype=dtype)
        self.o_proj = Linear(width, width, dtype=dtype)

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The Linears that take its input."""
        return (self.q_proj, self.k_proj, self.v_proj)

    def __call__(self, x: Float[Array, "N L D"] | Pending, shared: TilesShared, keys: Mapping[str, PRNGKeyArray]) -> Float[Array, "N L D"]:
        """``keys``: a dropout key for each Linear that drops, by its name."""
        N, L, _ = x.shape
        names = ("q_proj", "k_proj", "v_proj")
        projected = project((self.q_proj, self.k_proj, self.v_proj), x, [keys.get(name) for name in names])
        q, k, v = (t.reshape(N, L, self.heads, -1) for t in projected)
        y = attention(q, k, v, segments=shared.seen, causal=False, backend=shared.backend)
        return self.o_proj(y.reshape(N, L, -1), keys.get("o_proj"))


class TilesLayer(nnx.Module):
    """x += g · attn(norm(x)); x += g' · mlp(norm(x)); g = tanh(gate) of a ``gated`` layer, else 1."""

    def __init__(self, config: TilesConfig, *, gated: bool = False, dtype: Any):
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.self_attn = TilesAttention(config, dtype=dtype)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp = PlainMLP(config.hidden_size, config.intermediate_size, activation="gelu", dtype=dtype)
        self.gate_attn, self.gate_ffn = (nnx.data(nnx.Param(abstract((1,), dtype)) if gated else None) for _ in range(2))

    def __call__(self, x: Float[Array, "N L D"], shared: TilesShared, layer: LayerInputs) -> tuple[Float[Array, "N L D"], None]:
        """Returns the state; a layer has no output of its own."""
        keys = layer.keys or {}
        x, normed = branch(self.input_layernorm, x, self.self_attn.inputs, keys)
        attended = self.self_attn(normed, shared, keys)
        x = residual(x, attended if self.gate_attn is None else gate(self.gate_attn, x.dtype) * attended)
        x, normed = branch(self.post_attention_layernorm, x, self.mlp.inputs, keys)
        y = self.mlp(normed, keys)
        return add(x, y if self.gate_ffn is None else gate(self.gate_ffn, x.dtype) * y), None


class TilesEncoder(nnx.Module):
    """Layers under their path ``layers``."""

    def __init__(self, layers: list[Any], *, path: str):
        self.layers = Stack(layers, path=f"{path}.layers")

    def __call__(
        self, x: Float[Array, "N L D"], shared: TilesShared, execution: Execution, *, collect: tuple[int, ...] = ()
    ) -> tuple[Float[Array, "N L D"], list[Array]]:
        """The last state, and the inputs of the layers to ``collect``."""
        key = execution.dropout_key
        inputs = LayerInputs(keys=None if key is None else self.layers.dropout_keys(key))
        x, collected, _ = self.layers(x, shared, inputs, collect=collect, scan=execution.scan)
        return x, collected


class TilesTower(nnx.Module):
    """Embeddings, the local layers, the gated global ones; the features are the last state and intermediate ones, side by side."""

    def __init__(self, config: TilesConfig, *, path: str, dtype: Any):
        self.config = config
        width, patch = config.hidden_size, (config.num_channels, config.patch_size, config.patch_size)
        self.patch_embedding = PatchProjection(patch, width, dtype=dtype)
        self.class_embedding: nnx.Param[Any] = nnx.Param(abstract((width,), dtype))
        self.gated_positional_embedding = PositionEmbedding(config, dtype=dtype)
        self.pre_tile_positional_embedding = TileEmbedding(config, dtype=dtype)
        self.post_tile_positional_embedding = TileEmbedding(config, dtype=dtype)
        self.layernorm_pre = LayerNorm(width, eps=_NORM_EPS, dtype=dtype)
        self.layernorm_post = LayerNorm(width, eps=_NORM_EPS, dtype=dtype)
        local = [TilesLayer(config, dtype=dtype) for _ in range(config.num_hidden_layers)]
        far = [TilesLayer(config, gated=True, dtype=dtype) for _ in range(config.num_global_layers)]
        self.transformer = TilesEncoder(local, path=f"{path}.transformer")
        self.global_transformer = TilesEncoder(far, path=f"{path}.global_transformer")

    def __call__(self, batch: Batch, execution: Execution, dtype: Any) -> Float[Array, "P V E"]:
        """The batch's images to the features of their V tokens (of all tiles of all images of a data shard), computed in ``dtype``.

        Channel c of intermediate state i is feature D + c · I + i, of I intermediate states.
        """
        P, images = batch.aspect_ratio_ids.shape
        ratios = batch.aspect_ratio_ids.reshape(-1)
        shared = TilesShared(self.seen(ratios), execution.attention)
        x, states = self.transformer(self.embed(batch, dtype), shared, execution, collect=self.config.collected)
        x = self.layernorm_post(x) + self._laid_out(self.post_tile_positional_embedding(ratios, dtype))
        x, _ = self.global_transformer(x, shared, execution)
        tokens = self.config.max_num_tiles * (self.config.patches + 1)
        between = jnp.stack([state[:, :tokens] for state in states], axis=-1).reshape(P * images, tokens, -1)
        return jnp.concatenate([x[:, :tokens], between], axis=-1).reshape(P, images * tokens, -1)

    def embed(self, batch: Batch, dtype: Any) -> Float[Array, "N L D"]:
        """What the first layer gets: the tiles' tokens one after the other, then the padding of all tiles."""
        config, ratios = self.config, batch.aspect_ratio_ids.reshape(-1)
        P, images = batch.aspect_ratio_ids.shape
        patches = batch.patches[:, : images * config.max_num_tiles * config.patches].astype(dtype)
        x = self.patch_embedding(patches).reshape(P * images, config.max_num_tiles, config.patches, -1)
        x = x + self.pre_tile_positional_embedding(ratios, dtype)
        first = jnp.broadcast_to(self.class_embedding.get_value().astype(dtype), (*x.shape[:2], 1, x.shape[3]))
        x = jnp.concatenate([first, x], axis=2) + self.gated_positional_embedding(ratios, dtype)
        x = self.layernorm_pre(x).reshape(P * images, -1, x.shape[3])
        return jnp.pad(x, ((0, 0), (0, config.max_num_tiles * config.padding), (0, 0)))

    def seen(self, ratios: Int[Array, " N"]) -> Intervals:
        """What each token of an image sees: tokens all, padding the tokens. An unused place counts as one tile."""
        config = self.config
        tiles = jnp.array([1, *(math.prod(ratio) for ratio in config.aspect_ratios)], jnp.int32)
        real = tiles[ratios][:, None] * (config.patches + 1)
        length = config.max_num_tiles * (config.patches + 1 + config.padding)
        place = jnp.arange(length, dtype=jnp.int32)[None]
        return Intervals(jnp.zeros((ratios.shape[0], length), jnp.int32), jnp.where(place < real, length, real))

    def _laid_out(self, tiles: Float[Array, "N T 1 D"]) -> Float[Array, "N L D"]:
        """A vector a tile at each of its tokens, and at its padding."""
        config = self.config
        parts = [jnp.repeat(tiles[:, :, 0], count, axis=1) for count in (config.patches + 1, config.padding)]
        return jnp.concatenate(parts, axis=1)


def gate(param: nnx.Param[Any], dtype: Any) -> Float[Array, ""]:
    """tanh of a gate [1], in ``dtype``."""
    return jnp.tanh(param.get_value().astype(dtype))[0]
