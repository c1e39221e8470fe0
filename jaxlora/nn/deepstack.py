"""Qwen3-VL's vision tower: learned positions, and features that leave it after several blocks for several layers of the text model."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxlora.data.batches import Batch
from jaxlora.nn.decoder import Execution
from jaxlora.nn.embed import Embed
from jaxlora.nn.linear import Linear
from jaxlora.nn.mlp import two_linears
from jaxlora.nn.norm import LayerNorm
from jaxlora.nn.pending import Pending
from jaxlora.nn.stack import Stack, fold_path
from jaxlora.nn.vision import PatchEmbed, VisionConfig, blocks, run_blocks
from jaxlora.typing import Array, Float, PRNGKeyArray


class VisionMLP(nnx.Module):
    """linear_fc2(gelu(linear_fc1 x)), with tanh's approximation of gelu."""

    def __init__(self, features: int, hidden: int, *, dtype: Any):
        self.linear_fc1 = Linear(features, hidden, bias=True, dtype=dtype)
        self.linear_fc2 = Linear(hidden, features, bias=True, dtype=dtype)

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The Linears that take its input."""
        return (self.linear_fc1,)

    def __call__(self, x: Float[Array, "*N D"] | Pending, keys: Mapping[str, PRNGKeyArray]) -> Float[Array, "*N D"]:
        """``keys``: a dropout key for each Linear that drops, by its name."""
        return two_linears(self.linear_fc1, self.linear_fc2, x, "gelu_tanh", [keys.get(name) for name in ("linear_fc1", "linear_fc2")])


class FeatureMerger(nnx.Module):
    """W₂ gelu(W₁ [x_1 … x_m²]), m² neighbours of a merge block, normed one by one or, with ``norm_together``, as one vector."""

    def __init__(self, config: VisionConfig, *, norm_together: bool = False, path: str, dtype: Any):
        self.path, self.merged, self.norm_together = path, config.merged, norm_together
        width = config.embed_dim * config.merged
        self.norm = LayerNorm(width if norm_together else config.embed_dim, eps=config.norm_eps, dtype=dtype)
        self.linear_fc1 = Linear(width, width, bias=True, dtype=dtype)
        self.linear_fc2 = Linear(width, config.out_features, bias=True, dtype=dtype)

    def __call__(self, x: Float[Array, "P W D"], key: PRNGKeyArray | None) -> Float[Array, "P F O"]:
        """[P, W, D] to [P, W/m², O]; ``key`` is the forward pass's, before a path is folded in."""
        P, W, _ = x.shape
        x = x if self.norm_together else self.norm(x)
        x = x.reshape(P, W // self.merged, -1)
        x = self.norm(x) if self.norm_together else x
        keys = [None if key is None else fold_path(key, f"{self.path}.{name}") for name in ("linear_fc1", "linear_fc2")]
        return two_linears(self.linear_fc1, self.linear_fc2, x, "gelu", keys)


class DeepstackTower(nnx.Module):
    """Patch embedding with learned positions, blocks with rotary ones, a merger, and one for each block after which features leave."""

    def __init__(self, config: VisionConfig, *, path: str, dtype: Any):
        assert config.position_side is not None
        self.config = config
        self.patch_embed = PatchEmbed(config, dtype=dtype)
        self.pos_embed = Embed(config.position_side**2, config.embed_dim, dtype=dtype)
        self.blocks = Stack(blocks(config, norm=LayerNorm, mlp=VisionMLP, dtype=dtype), path=f"{path}.blocks")
        self.merger = FeatureMerger(config, path=f"{path}.merger", dtype=dtype)
        paths = [f"{path}.deepstack_merger_list.{i}" for i in range(len(config.deepstack_blocks))]
        mergers = [FeatureMerger(config, norm_together=True, path=own, dtype=dtype) for own in paths]
        self.deepstack_merger_list: nnx.List[Any] = nnx.List(mergers)

    def __call__(self, batch: Batch, execution: Execution, dtype: Any) -> tuple[Float[Array, "P F O"], Float[Array, "N P F O"] | None]:
        """The features of the batch's patches, and those for each of the text model's first N layers; computed in ``dtype``.

        A patch in no segment is padding: it changes no other patch's feature.

        Raises:
          ValueError: W is no multiple of m².
        """
        after = [i + 1 for i in self.config.deepstack_blocks]
        x, states = run_blocks(self.config, self.blocks, self.embed(batch, dtype), batch, execution, collect=after)
        key = execution.dropout_key
        leaving = [merger(state, key) for merger, state in zip(self.deepstack_merger_list, states, strict=True)]
        return self.merger(x, key), jnp.stack(leaving) if leaving else None

    def embed(self, batch: Batch, dtype: Any) -> Float[Array, "P W D"]:
        """What the first block gets: patches and their positions, interpolated in fp32."""
        rows = self.pos_embed(batch.patch_taps).astype(jnp.float32)
        positions = jnp.sum(rows * batch.patch_tap_weights[..., None], axis=2)
        return self.patch_embed(batch.patches.astype(dtype)) + positions.astype(dtype)
