"""The Qwen-VL family's vision towers: patches in merge-block order to features for the text model, and their fusion with the tokens."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from conversion.hf_config import Rope
from jaxlora.data.batches import Batch
from jaxlora.errors import raise_all
from jaxlora.nn import rope
from jaxlora.nn.attention import LayerInputs, Segments, Shared, kept_heads
from jaxlora.nn.decoder import Execution
from jaxlora.nn.embed import features_at
from jaxlora.nn.linear import Linear
from jaxlora.nn.mlp import two_linears
from jaxlora.nn.norm import add, branch, residual
from jaxlora.nn.pending import Pending
from jaxlora.nn.stack import Stack, fold_path
from jaxlora.typing import Array, Float, Int, PRNGKeyArray
from jaxlora.weights.base import abstract, beside, contract_last
from pallas_kernels.attention import Alike, attention

# Makes a module from its sizes, as a class or with arguments bound.
type Build = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A tower's sizes. ``embed_dim`` is its own width, ``out_features`` the text model's (``hidden_size`` in Qwen2-VL's file).

    ``window`` is the side of an attention window in merged cells (None: no block has windows), ``full_blocks`` the blocks that attend to
    the whole frame all the same. ``tokens_per_second`` spaces a video's frames in time (None: by one position). ``position_side`` is the
    side of a square table of learned positions. After each of ``deepstack_blocks`` features leave the tower.
    """

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
    norm_eps: float = 1e-6
    window: int | None = None
    full_blocks: tuple[int, ...] = ()
    tokens_per_second: float | None = None
    patch_bias: bool = False
    position_side: int | None = None
    deepstack_blocks: tuple[int, ...] = ()

    def __post_init__(self):
        named = (*self.full_blocks, *self.deepstack_blocks)
        faults = [f"block {i} is named, but there are {self.depth} blocks" for i in named if not 0 <= i < self.depth]
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
    """y = W x + b for flattened patches, with the weight [O, channels, frames, height, width] as it is on disk.

    No ``Linear``: it is never adapted and never quantised.
    """

    def __init__(self, patch_shape: tuple[int, ...], features: int, *, bias: bool = False, dtype: Any):
        self.weight: nnx.Param[Any] = nnx.Param(abstract((features, *patch_shape), dtype))
        self.bias: Any = nnx.data(nnx.Param(abstract((features,), dtype)) if bias else None)

    def __call__(self, patches: Float[Array, "P W E"]) -> Float[Array, "P W D"]:
        """A convolution whose stride is its kernel is one product a patch."""
        weight = self.weight.get_value()
        rows = patches.reshape(-1, patches.shape[-1])
        y = contract_last(rows, weight.reshape(weight.shape[0], -1).astype(patches.dtype)).reshape(*patches.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)[None, None]


class PatchEmbed(nnx.Module):
    """The projection under its path ``proj``."""

    def __init__(self, config: VisionConfig, *, dtype: Any):
        self.proj = PatchProjection(config.patch_shape, config.embed_dim, bias=config.patch_bias, dtype=dtype)

    def __call__(self, patches: Float[Array, "P W E"]) -> Float[Array, "P W D"]:
        """Embeds flattened patches."""
        return self.proj(patches)


@dataclasses.dataclass(frozen=True)
class VisionShared(Shared):
    """What every block sees: ``segments`` are the frames; ``windows`` (starts, lengths) [P, K] cut them further."""

    windows: tuple[Int[Array, "P K"], Int[Array, "P K"]] | None = None


class VisionAttention(nnx.Module):
    """Full attention inside each frame, or inside each window; q, k and v from one Linear; rotated in fp32."""

    def __init__(self, config: VisionConfig, *, windowed: bool = False, dtype: Any):
        self.heads = config.num_heads
        self.windowed = windowed
        self.longest = (config.window**2 * config.merged) if windowed and config.window is not None else None
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim, bias=True, dtype=dtype)
        self.proj = Linear(config.embed_dim, config.embed_dim, bias=True, dtype=dtype)

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The Linears that take its input."""
        return (self.qkv,)

    def __call__(self, x: Float[Array, "P W D"] | Pending, shared: VisionShared, keys: Mapping[str, PRNGKeyArray]) -> Float[Array, "P W D"]:
        """``keys``: a dropout key for each Linear that drops, by its name."""
        P, W, _ = x.shape
        q, k, v = (t.reshape(P, W, self.heads, -1) for t in thirds(self.qkv(x, keys.get("qkv"))))
        q, k = (rope.rotate(t, shared.rope) for t in (q, k))
        segments = shared.windows if self.windowed else shared.segments
        assert segments is not None
        q, k, v = kept_heads(q, k, v)
        y = attention(q, k, v, segments=segments, causal=False, longest=self.longest, backend=shared.backend)
        return self.proj(y.reshape(P, W, -1), keys.get("proj"))


@jax.custom_vjp
def thirds(qkv: Float[Array, "P W columns"]) -> tuple[Float[Array, "P W D"], ...]:
    """The three thirds of the columns; what makes their gradients writes them side by side.

    >>> [t.tolist() for t in thirds(jnp.array([[[1.0, 2.0, 3.0]]]))]
    [[[[1.0]]], [[[2.0]]], [[[3.0]]]]
    """
    return tuple(jnp.split(qkv, 3, axis=2))


def _thirds_fwd(qkv: Array) -> tuple[tuple[Array, ...], None]:
    return thirds(qkv), None


def _thirds_bwd(_: None, dys: tuple[Array, ...]) -> tuple[Array]:
    rows = beside(*(dy.reshape(-1, dy.shape[2]) for dy in dys), made=True)
    return (rows.reshape(*dys[0].shape[:2], -1),)


thirds.defvjp(_thirds_fwd, _thirds_bwd)


class VisionBlock(nnx.Module):
    """x += attn(norm1(x)); x += mlp(norm2(x)); ``norm`` and ``mlp`` make the architecture's own."""

    def __init__(self, config: VisionConfig, *, norm: Build, mlp: Build, windowed: bool = False, dtype: Any):
        self.norm1 = norm(config.embed_dim, eps=config.norm_eps, dtype=dtype)
        self.norm2 = norm(config.embed_dim, eps=config.norm_eps, dtype=dtype)
        self.attn = VisionAttention(config, windowed=windowed, dtype=dtype)
        self.mlp = mlp(config.embed_dim, config.mlp_dim, dtype=dtype)

    def __call__(self, x: Float[Array, "P W D"], shared: VisionShared, layer: LayerInputs) -> tuple[Float[Array, "P W D"], None]:
        """Returns the state; a block has no output of its own."""
        keys = layer.keys or {}
        x, normed = branch(self.norm1, x, self.attn.inputs, keys)
        x = residual(x, self.attn(normed, shared, keys))
        x, normed = branch(self.norm2, x, self.mlp.inputs, keys)
        return add(x, self.mlp(normed, keys)), None


class PatchMerger(nnx.Module):
    """W₂ gelu(W₀ [ln(x_1) … ln(x_m²)]): one feature of the m² neighbours of a merge block, which are consecutive rows."""

    def __init__(self, config: VisionConfig, *, norm: Build, path: str, dtype: Any):
        self.path = path
        self.merged = config.merged
        width = config.embed_dim * config.merged
        self.ln_q = norm(config.embed_dim, eps=config.norm_eps, dtype=dtype)
        # The activation has a place of its own, so that the Linears are 0 and 2 as in the checkpoints.
        layers = (Linear(width, width, bias=True, dtype=dtype), "gelu", Linear(width, config.out_features, bias=True, dtype=dtype))
        self.mlp: nnx.List[Any] = nnx.List(layers)

    def __call__(self, x: Float[Array, "P W D"], key: PRNGKeyArray | None) -> Float[Array, "P F O"]:
        """[P, W, D] to [P, W/m², O]; ``key`` is the forward pass's, before a path is folded in."""
        P, W, _ = x.shape
        first, activation, last = self.mlp
        keys = [None if key is None else fold_path(key, f"{self.path}.mlp.{i}") for i in (0, 2)]
        return two_linears(first, last, self.ln_q(x).reshape(P, W // self.merged, -1), activation, keys)


class VisionTower(nnx.Module):
    """Patch embedding, blocks with two-dimensional rotary positions, merger."""

    def __init__(self, config: VisionConfig, *, norm: Build, mlp: Build, path: str, dtype: Any):
        self.config = config
        self.patch_embed = PatchEmbed(config, dtype=dtype)
        self.blocks = Stack(blocks(config, norm=norm, mlp=mlp, dtype=dtype), path=f"{path}.blocks")
        self.merger = PatchMerger(config, norm=norm, path=f"{path}.merger", dtype=dtype)

    def __call__(self, batch: Batch, execution: Execution, dtype: Any) -> tuple[Float[Array, "P F O"], None]:
        """The batch's patches of P data shards to their features, F = W / m², computed in ``dtype``; and no features for single layers.

        A patch in no segment is padding: it changes no other patch's feature.

        Raises:
          ValueError: W is no multiple of m².
        """
        x, _ = run_blocks(self.config, self.blocks, self.embed(batch, dtype), batch, execution)
        return self.merger(x, execution.dropout_key), None

    def embed(self, batch: Batch, dtype: Any) -> Float[Array, "P W D"]:
        """What the first block gets."""
        return self.patch_embed(batch.patches.astype(dtype))


def blocks(config: VisionConfig, *, norm: Build, mlp: Build, dtype: Any) -> list[VisionBlock]:
    """A tower's blocks, windowed where the config says so."""
    windowed = [config.window is not None and i not in config.full_blocks for i in range(config.depth)]
    return [VisionBlock(config, norm=norm, mlp=mlp, windowed=windows, dtype=dtype) for windows in windowed]


def run_blocks(
    config: VisionConfig, stack: Stack, x: Float[Array, "P W D"], batch: Batch, execution: Execution, *, collect: Sequence[int] = ()
) -> tuple[Float[Array, "P W D"], list[Array]]:
    """Embedded patches through the blocks; ``collect`` as ``Stack`` has it.

    Raises:
      ValueError: W is no multiple of m².
    """
    if x.shape[1] % config.merged:
        raise ValueError(f"room for {x.shape[1]} patches a shard, which is no multiple of the {config.merged} in one feature")
    inverse = rope.frequencies(config.head_dim // 2, Rope(theta=config.rope_theta))
    windows = None if config.window is None else (batch.patch_window_starts, batch.patch_window_lengths)
    table = rope.axial_table(batch.patch_positions, inverse, jnp.float32)
    shared = VisionShared(table, frames(batch), execution.attention, windows=windows)
    key = execution.dropout_key
    layers = LayerInputs(keys=None if key is None else stack.dropout_keys(key))
    x, collected, _ = stack(x, shared, layers, collect=collect, scan=execution.scan)
    return x, collected


def frames(batch: Batch) -> Segments | Alike:
    """What the patches of a batch attend within: their frame, or where all frames are alike the room for one."""
    starts, lengths = batch.patch_segment_starts, batch.patch_segment_lengths
    return Alike(lengths.shape[-1]) if starts is None else (starts, lengths)


def fuse(tokens: Float[Array, "B S D"], features: Float[Array, "P F D"], index: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Replaces token (b, s) by row ``index[b, s]`` of its data shard's features; -1 keeps the token. Row b belongs to shard b // (B / P).

    >>> fuse(jnp.zeros((1, 3, 1)), jnp.array([[[5.0], [7.0]]]), jnp.array([[-1, 1, 0]])).ravel().tolist()
    [0.0, 7.0, 5.0]
    """
    return jnp.where(index[..., None] >= 0, features_at(index, features).astype(tokens.dtype), tokens)
