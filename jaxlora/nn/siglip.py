"""SigLIP's vision tower (Zhai et al. 2023, arXiv:2303.15343): learned positions, full attention inside each image."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from jaxlora.data.batches import Batch
from jaxlora.errors import raise_all
from jaxlora.nn.attention import LayerInputs, Segments
from jaxlora.nn.decoder import Execution
from jaxlora.nn.embed import Embed
from jaxlora.nn.linear import Linear, project
from jaxlora.nn.mlp import PlainMLP
from jaxlora.nn.norm import LayerNorm, add, branch, residual
from jaxlora.nn.pending import Pending
from jaxlora.nn.stack import Stack
from jaxlora.nn.vision import frames
from jaxlora.typing import Array, Float, Int, PRNGKeyArray
from jaxlora.weights.base import abstract, contract_last
from pallas_kernels.attention import Alike, attention

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """A tower's sizes in Hugging Face's words; every image has ``image_size`` x ``image_size`` pixels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    hidden_act: str = "gelu_pytorch_tanh"

    def __post_init__(self):
        faults = []
        if self.hidden_size % self.num_attention_heads:
            faults.append(f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}")
        if self.hidden_act not in ACTIVATIONS:
            faults.append(f"hidden_act = {self.hidden_act!r} is not implemented; expected {' or '.join(ACTIVATIONS)}")
        if self.image_size % self.patch_size:
            faults.append(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        raise_all("the vision tower's sizes do not fit together", faults)

    @property
    def side(self) -> int:
        """Patches along a side of an image."""
        return self.image_size // self.patch_size


class PatchEmbedding(nnx.Module):
    """y = W x + b for flattened patches, with the weight [O, channels, height, width] as it is on disk; no ``Linear``, never adapted."""

    def __init__(self, config: SiglipConfig, *, dtype: Any):
        shape = (config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
        self.weight: nnx.Param[Any] = nnx.Param(abstract(shape, dtype))
        self.bias: nnx.Param[Any] = nnx.Param(abstract(shape[:1], dtype))

    def __call__(self, patches: Float[Array, "P W E"]) -> Float[Array, "P W D"]:
        """A convolution whose stride is its kernel is one product a patch."""
        weight, bias = (p.get_value().astype(patches.dtype) for p in (self.weight, self.bias))
        rows = contract_last(patches.reshape(-1, patches.shape[-1]), weight.reshape(weight.shape[0], -1))
        return (rows + bias[None]).reshape(*patches.shape[:-1], -1)


class SiglipEmbeddings(nnx.Module):
    """Embedded patches plus a learned vector for each place in the image."""

    def __init__(self, config: SiglipConfig, *, dtype: Any):
        self.side = config.side
        self.patch_embedding = PatchEmbedding(config, dtype=dtype)
        self.position_embedding = Embed(config.side**2, config.hidden_size, dtype=dtype)

    def __call__(self, patches: Float[Array, "P W E"], positions: Int[Array, "P W 2"]) -> Float[Array, "P W D"]:
        """``positions`` are (row, column)."""
        places = positions[..., 0] * self.side + positions[..., 1]
        return self.patch_embedding(patches) + self.position_embedding(places).astype(patches.dtype)


@dataclasses.dataclass(frozen=True)
class SiglipShared:
    """What every layer sees: the images, (starts, lengths) [P, N] in patches, and the attention backend."""

    segments: Segments | Alike
    backend: str = "auto"


class SiglipAttention(nnx.Module):
    """out(softmax(q kᵀ / √C) v) among the patches of an image."""

    def __init__(self, config: SiglipConfig, *, dtype: Any):
        self.heads = config.num_attention_heads
        width = config.hidden_size
        self.q_proj = Linear(width, width, bias=True, dtype=dtype)
        self.k_proj = Linear(width, width, bias=True, dtype=dtype)
        self.v_proj = Linear(width, width, bias=True, dtype=dtype)
        self.out_proj = Linear(width, width, bias=True, dtype=dtype)

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The Linears that take its input."""
        return (self.q_proj, self.k_proj, self.v_proj)

    def __call__(self, x: Float[Array, "P W D"] | Pending, shared: SiglipShared, keys: Mapping[str, PRNGKeyArray]) -> Float[Array, "P W D"]:
        """``keys``: a dropout key for each Linear that drops, by its name."""
        P, W, _ = x.shape
        names = ("q_proj", "k_proj", "v_proj")
        projected = project((self.q_proj, self.k_proj, self.v_proj), x, [keys.get(name) for name in names])
        q, k, v = (t.reshape(P, W, self.heads, -1) for t in projected)
        y = attention(q, k, v, segments=shared.segments, causal=False, backend=shared.backend)
        return self.out_proj(y.reshape(P, W, -1), keys.get("out_proj"))


class SiglipLayer(nnx.Module):
    """x += attn(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, config: SiglipConfig, *, dtype: Any):
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.self_attn = SiglipAttention(config, dtype=dtype)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.mlp = PlainMLP(config.hidden_size, config.intermediate_size, activation=ACTIVATIONS[config.hidden_act], dtype=dtype)

    def __call__(self, x: Float[Array, "P W D"], shared: SiglipShared, layer: LayerInputs) -> tuple[Float[Array, "P W D"], None]:
        """Returns the state; a layer has no output of its own."""
        keys = layer.keys or {}
        x, normed = branch(self.layer_norm1, x, self.self_attn.inputs, keys)
        x = residual(x, self.self_attn(normed, shared, keys))
        x, normed = branch(self.layer_norm2, x, self.mlp.inputs, keys)
        return add(x, self.mlp(normed, keys)), None


class SiglipEncoder(nnx.Module):
    """The layers under their path ``layers``."""

    def __init__(self, config: SiglipConfig, *, path: str, dtype: Any):
        self.layers = Stack([SiglipLayer(config, dtype=dtype) for _ in range(config.num_hidden_layers)], path=f"{path}.layers")

    def __call__(self, x: Float[Array, "P W D"], segments: Segments | Alike, execution: Execution, layer: int) -> Float[Array, "P W D"]:
        """The state that enters ``layer``, which at the number of layers is the output; ``segments`` are the images."""
        key = execution.dropout_key
        inputs = LayerInputs(keys=None if key is None else self.layers.dropout_keys(key))
        _, [state], _ = self.layers(x, SiglipShared(segments, execution.attention), inputs, collect=(layer,), scan=execution.scan)
        return state


class SiglipTower(nnx.Module):
    """Embeddings, layers, final norm; the pooling head of SigLIP itself is not part of it.

    With a ``feature_layer`` the features are the state that enters that layer, without the final norm (LLaVA).
    """

    def __init__(self, config: SiglipConfig, *, feature_layer: int | None = None, path: str, dtype: Any):
        self.config, self.feature_layer = config, feature_layer
        self.embeddings = SiglipEmbeddings(config, dtype=dtype)
        self.encoder = SiglipEncoder(config, path=f"{path}.encoder", dtype=dtype)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, batch: Batch, execution: Execution, dtype: Any) -> Float[Array, "P W D"]:
        """The batch's patches of P data shards to their states, computed in ``dtype``; padding changes no other patch."""
        x = self.embeddings(batch.patches.astype(dtype), batch.patch_positions)
        layer = self.config.num_hidden_layers if self.feature_layer is None else self.feature_layer
        x = self.encoder(x, frames(batch), execution, layer)
        return self.post_layernorm(x) if self.feature_layer is None else x
