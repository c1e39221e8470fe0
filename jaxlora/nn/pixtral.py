"""Pixtral's vision tower (Agrawal et al. 2024, arXiv:2410.07073): images of any size, turned by row and column, a SwiGLU in each layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from conversion.hf_config import Rope
from jaxlora.data.batches import Batch
from jaxlora.errors import raise_all
from jaxlora.nn import rope
from jaxlora.nn.attention import LayerInputs, Shared, kept_heads
from jaxlora.nn.decoder import Execution
from jaxlora.nn.linear import Linear, project
from jaxlora.nn.mlp import SwiGLU
from jaxlora.nn.norm import RMSNorm, add, branch, residual
from jaxlora.nn.pending import Pending
from jaxlora.nn.stack import Stack
from jaxlora.nn.vision import PatchProjection, frames
from jaxlora.typing import Array, Float, PRNGKeyArray
from pallas_kernels.attention import attention

_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixtralConfig:
    """A tower's sizes in Hugging Face's words."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    patch_size: int
    rope_theta: float

    def __post_init__(self):
        faults = []
        if self.hidden_size % self.num_attention_heads:
            faults.append(f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}")
        elif self.head_dim % 4:
            faults.append(f"the head size {self.head_dim} must be a multiple of 4: rows and columns turn pairs of channels each")
        raise_all("the vision tower's sizes do not fit together", faults)

    @property
    def head_dim(self) -> int:
        """C."""
        return self.hidden_size // self.num_attention_heads


def frequencies(config: PixtralConfig) -> Float[np.ndarray, "2 c"]:
    """Inverse frequencies of rows and of columns: the even and the odd ones of θ^(-2j/C).

    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_channels=3, patch_size=2)
    >>> frequencies(PixtralConfig(**sizes, rope_theta=1e4)).round(4).tolist()
    [[1.0, 0.009999999776482582], [0.10000000149011612, 0.0010000000474974513]]
    """
    both = rope.frequencies(config.head_dim, Rope(theta=config.rope_theta))
    return np.stack([both[0::2], both[1::2]])


class PixtralAttention(nnx.Module):
    """o(softmax(q kᵀ / √C) v) among the patches of an image."""

    def __init__(self, config: PixtralConfig, *, dtype: Any):
        self.heads = config.num_attention_heads
        self.q_proj = Linear(config.hidden_size, config.hidden_size, dtype=dtype)
        self.k_proj = Linear(config.hidden_size, config.hidden_size, dtype=dtype)
        self.v_proj = Linear(config.hidden_size, config.hidden_size, dtype=dtype)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, dtype=dtype)

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The Linears that take its input."""
        return (self.q_proj, self.k_proj, self.v_proj)

    def __call__(self, x: Float[Array, "P W D"] | Pending, shared: Shared, keys: Mapping[str, PRNGKeyArray]) -> Float[Array, "P W D"]:
        """``keys``: a dropout key for each Linear that drops, by its name."""
        P, W, _ = x.shape
        projected = project((self.q_proj, self.k_proj, self.v_proj), x, [keys.get(f"{name}_proj") for name in "qkv"])
        q, k, v = (t.reshape(P, W, self.heads, -1) for t in projected)
        q, k = rope.rotate(q, shared.rope), rope.rotate(k, shared.rope)
        q, k, v = kept_heads(q, k, v)
        y = attention(q, k, v, segments=shared.segments, causal=False, backend=shared.backend)
        return self.o_proj(y.reshape(P, W, -1), keys.get("o_proj"))


class PixtralLayer(nnx.Module):
    """x += attention(attention_norm(x)); x += feed_forward(ffn_norm(x))."""

    def __init__(self, config: PixtralConfig, *, dtype: Any):
        self.attention_norm = RMSNorm(config.hidden_size, eps=_EPS, dtype=dtype)
        self.attention = PixtralAttention(config, dtype=dtype)
        self.ffn_norm = RMSNorm(config.hidden_size, eps=_EPS, dtype=dtype)
        self.feed_forward = SwiGLU(config.hidden_size, config.intermediate_size, dtype=dtype)

    def __call__(self, x: Float[Array, "P W D"], shared: Shared, layer: LayerInputs) -> tuple[Float[Array, "P W D"], None]:
        """Returns the state; a layer has no output of its own."""
        keys = layer.keys or {}
        x, normed = branch(self.attention_norm, x, self.attention.inputs, keys)
        x = residual(x, self.attention(normed, shared, keys))
        x, normed = branch(self.ffn_norm, x, self.feed_forward.inputs, keys)
        return add(x, self.feed_forward(normed, keys)), None


class PixtralTransformer(nnx.Module):
    """The layers under their path ``layers``."""

    def __init__(self, config: PixtralConfig, *, path: str, dtype: Any):
        self.layers = Stack([PixtralLayer(config, dtype=dtype) for _ in range(config.num_hidden_layers)], path=f"{path}.layers")


class PixtralTower(nnx.Module):
    """Patch embedding, norm, layers; layers from ``feature_layer`` on change no feature."""

    def __init__(self, config: PixtralConfig, *, feature_layer: int, path: str, dtype: Any):
        self.config, self.feature_layer = config, feature_layer
        patch = config.num_channels, config.patch_size, config.patch_size
        self.patch_conv = PatchProjection(patch, config.hidden_size, dtype=dtype)
        self.ln_pre = RMSNorm(config.hidden_size, eps=_EPS, dtype=dtype)
        self.transformer = PixtralTransformer(config, path=f"{path}.transformer", dtype=dtype)

    def __call__(self, batch: Batch, execution: Execution, dtype: Any) -> Float[Array, "P W D"]:
        """The batch's patches of P data shards to their states, computed in ``dtype``; padding changes no other patch."""
        x = self.ln_pre(self.patch_conv(batch.patches.astype(dtype)))
        layers, key = self.transformer.layers, execution.dropout_key
        inputs = LayerInputs(keys=None if key is None else layers.dropout_keys(key))
        # transformers rotates in the activations' dtype here.
        table = rope.axial_table(batch.patch_positions, frequencies(self.config), jnp.dtype(dtype))
        shared = Shared(table, frames(batch), execution.attention)
        _, [state], _ = layers(x, shared, inputs, collect=(self.feature_layer,), scan=execution.scan)
        return state
