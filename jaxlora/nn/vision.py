"""Qwen2-VL's vision tower: patches in merge-block order to features for the text model, and their fusion with the tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from conversion.hf_config import Rope
from jaxlora.errors import raise_all
from jaxlora.nn import rope
from jaxlora.nn.attention import LayerInputs, Segments, Shared
from jaxlora.nn.decoder import Execution
from jaxlora.nn.linear import Linear
from jaxlora.nn.mlp import PlainMLP, gelu, quick_gelu
from jaxlora.nn.norm import LayerNorm
from jaxlora.nn.stack import Stack, fold_path
from jaxlora.typing import Array, Float, Int, PRNGKeyArray
from jaxlora.weights.base import abstract, contract_last
from pallas_kernels.attention import attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A tower's sizes. ``embed_dim`` is its own width, ``out_features`` the text model's (``hidden_size`` in Qwen2-VL's file)."""

    depth: int
    embed_dim: int
    out_features: int
    mlp_dim: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    rope_theta: float = 1e4
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        faults = []
        if self.embed_dim % self.num_heads:
            faults.append(f"embed_dim={self.embed_dim} must be a multiple of num_heads={self.num_heads}")
        elif self.head_dim % 4:
            faults.append(f"the head size {self.head_dim} must be a multiple of 4: rows and columns turn pairs of channels each")
        raise_all("the vision tower's sizes do not fit together", faults)

    @property
    def head_dim(self) -> int:
        """C."""
        return self.embed_dim // self.num_heads

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """(channels, frames, height, width) of a patch."""
        return self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size

    @property
    def merged(self) -> int:
        """Patches in one feature."""
        return self.spatial_merge_size**2


class PatchProjection(nnx.Module):
    """y = W x for flattened patches, with the weight [O, channels, frames, height, width] as it is on disk.

    No ``Linear``: it is never adapted and never quantised.
    """

    def __init__(self, patch_shape: tuple[int, ...], features: int, *, dtype: Any):
        self.weight: nnx.Param[Any] = nnx.Param(abstract((features, *patch_shape), dtype))

    def __call__(self, patches: Float[Array, "P W E"]) -> Float[Array, "P W D"]:
        """A convolution whose stride is its kernel is one product a patch."""
        weight = self.weight.get_value()
        rows = patches.reshape(-1, patches.shape[-1])
        return contract_last(rows, weight.reshape(weight.shape[0], -1).astype(patches.dtype)).reshape(*patches.shape[:-1], -1)


class PatchEmbed(nnx.Module):
    """The projection under its path ``proj``."""

    def __init__(self, config: VisionConfig, *, dtype: Any):
        self.proj = PatchProjection(config.patch_shape, config.embed_dim, dtype=dtype)

    def __call__(self, patches: Float[Array, "P W E"]) -> Float[Array, "P W D"]:
        """Embeds flattened patches."""
        return self.proj(patches)


class VisionAttention(nnx.Module):
    """Full attention inside each segment (a frame), q, k and v from one Linear; rotated in fp32."""

    def __init__(self, config: VisionConfig, *, dtype: Any):
        self.heads = config.num_heads
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim, bias=True, dtype=dtype)
        self.proj = Linear(config.embed_dim, config.embed_dim, bias=True, dtype=dtype)

    def __call__(self, x: Float[Array, "P W D"], shared: Shared, keys: Mapping[str, PRNGKeyArray]) -> Float[Array, "P W D"]:
        """``keys``: a dropout key for each Linear that drops, by its name."""
        P, W, _ = x.shape
        qkv = self.qkv(x, keys.get("qkv")).reshape(P, W, 3, self.heads, -1)
        q, k = (rope.rotate(qkv[:, :, i], shared.rope) for i in (0, 1))
        y = attention(q, k, qkv[:, :, 2], segments=shared.segments, causal=False, backend=shared.backend)
        return self.proj(y.reshape(P, W, -1), keys.get("proj"))


class VisionBlock(nnx.Module):
    """x += attn(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, config: VisionConfig, *, dtype: Any):
        self.norm1 = LayerNorm(config.embed_dim, eps=config.layer_norm_eps, dtype=dtype)
        self.norm2 = LayerNorm(config.embed_dim, eps=config.layer_norm_eps, dtype=dtype)
        self.attn = VisionAttention(config, dtype=dtype)
        self.mlp = PlainMLP(config.embed_dim, config.mlp_dim, activation=quick_gelu, dtype=dtype)

    def __call__(self, x: Float[Array, "P W D"], shared: Shared, layer: LayerInputs) -> tuple[Float[Array, "P W D"], None]:
        """Returns the state; a block has no output of its own."""
        keys = layer.keys or {}
        x = x + self.attn(self.norm1(x), shared, keys)
        return x + self.mlp(self.norm2(x), keys), None


class PatchMerger(nnx.Module):
    """W₂ gelu(W₀ [ln(x_1) … ln(x_m²)]): one feature of the m² neighbours of a merge block, which are consecutive rows."""

    def __init__(self, config: VisionConfig, *, path: str, dtype: Any):
        self.path = path
        self.merged = config.merged
        width = config.embed_dim * config.merged
        self.ln_q = LayerNorm(config.embed_dim, eps=config.layer_norm_eps, dtype=dtype)
        # The activation has a place of its own, so that the Linears are 0 and 2 as in the checkpoints.
        layers = (Linear(width, width, bias=True, dtype=dtype), gelu, Linear(width, config.out_features, bias=True, dtype=dtype))
        self.mlp: nnx.List[Any] = nnx.List(layers)

    def __call__(self, x: Float[Array, "P W D"], key: PRNGKeyArray | None) -> Float[Array, "P F O"]:
        """[P, W, D] to [P, W/m², O]; ``key`` is the forward pass's, before a path is folded in."""
        P, W, _ = x.shape
        first, activation, last = self.mlp
        keys = [None if key is None else fold_path(key, f"{self.path}.mlp.{i}") for i in (0, 2)]
        h = first(self.ln_q(x).reshape(P, W // self.merged, -1), keys[0])
        return last(activation(h.astype(jnp.float32)).astype(h.dtype), keys[1])


class VisionTower(nnx.Module):
    """Patch embedding, blocks with two-dimensional rotary positions, merger."""

    def __init__(self, config: VisionConfig, *, path: str, dtype: Any):
        self.config = config
        self.patch_embed = PatchEmbed(config, dtype=dtype)
        self.blocks = Stack([VisionBlock(config, dtype=dtype) for _ in range(config.depth)], path=f"{path}.blocks")
        self.merger = PatchMerger(config, path=f"{path}.merger", dtype=dtype)

    def __call__(
        self, patches: Float[Array, "P W E"], positions: Int[Array, "P W 2"], segments: Segments, execution: Execution
    ) -> Float[Array, "P F O"]:
        """Patches (in the dtype to compute in) of P data shards to their features, F = W / m².

        ``positions`` are (row, column), ``segments`` the frames, (starts, lengths) [P, N] in patches. A patch in no segment is
        padding: it changes no other patch's feature.

        Raises:
          ValueError: W is no multiple of m².
        """
        if patches.shape[1] % self.config.merged:
            raise ValueError(
                f"room for {patches.shape[1]} patches a shard, which is no multiple of the {self.config.merged} in one feature"
            )
        inverse = rope.frequencies(self.config.head_dim // 2, Rope(theta=self.config.rope_theta))
        shared = Shared(rope.axial_table(positions, inverse, jnp.float32), segments, execution.attention)
        key = execution.dropout_key
        layers = LayerInputs(keys=None if key is None else self.blocks.dropout_keys(key))
        x, _, _ = self.blocks(self.patch_embed(patches), shared, layers, remat=execution.remat, checkpoint=execution.checkpoint)
        return self.merger(x, key)


def fuse(tokens: Float[Array, "B S D"], features: Float[Array, "P F D"], index: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Replaces token (b, s) by row ``index[b, s]`` of its data shard's features; -1 keeps the token. Row b belongs to shard b // (B / P).

    >>> fuse(jnp.zeros((1, 3, 1)), jnp.array([[[5.0], [7.0]]]), jnp.array([[-1, 1, 0]])).ravel().tolist()
    [0.0, 7.0, 5.0]
    """
    P = features.shape[0]
    rows = jax.vmap(lambda own, at: jnp.take(own, at, axis=0, mode="clip"))(features, index.reshape(P, -1))
    return jnp.where(index[..., None] >= 0, rows.reshape(tokens.shape).astype(tokens.dtype), tokens)
