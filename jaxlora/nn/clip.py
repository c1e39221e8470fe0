"""CLIP's vision tower (Radford et al. 2021, arXiv:2103.00020): SigLIP's layers, with a class token before every image's patches."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxlora.data.batches import Batch
from jaxlora.nn.decoder import Execution
from jaxlora.nn.embed import Embed
from jaxlora.nn.norm import LayerNorm
from jaxlora.nn.siglip import SiglipConfig, SiglipEncoder
from jaxlora.nn.vision import PatchProjection
from jaxlora.typing import Array, Float
from jaxlora.weights.base import abstract
from pallas_kernels.attention import Alike


class ClipEmbeddings(nnx.Module):
    """The class token and the embedded patches of each image, plus a learned vector for each place."""

    def __init__(self, config: SiglipConfig, *, dtype: Any):
        self.class_embedding: nnx.Param[Any] = nnx.Param(abstract((config.hidden_size,), dtype))
        patch = config.num_channels, config.patch_size, config.patch_size
        self.patch_embedding = PatchProjection(patch, config.hidden_size, dtype=dtype)
        self.position_embedding = Embed(1 + config.side**2, config.hidden_size, dtype=dtype)

    def __call__(self, patches: Float[Array, "I n E"]) -> Float[Array, "I m D"]:
        """``patches`` are whole images, row by row; m = n + 1."""
        embedded = self.patch_embedding(patches)
        first = self.class_embedding.get_value().astype(embedded.dtype)[None, None]
        x = jnp.concatenate([jnp.broadcast_to(first, (len(patches), 1, first.shape[-1])), embedded], axis=1)
        return x + self.position_embedding(jnp.arange(x.shape[1])).astype(x.dtype)[None]


class ClipTower(nnx.Module):
    """Embeddings, norm (spelled as in the checkpoints), layers. Layers from ``feature_layer`` on and the last norm change no feature."""

    def __init__(self, config: SiglipConfig, *, feature_layer: int, path: str, dtype: Any):
        self.config, self.feature_layer = config, feature_layer
        self.embeddings = ClipEmbeddings(config, dtype=dtype)
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.encoder = SiglipEncoder(config, path=f"{path}.encoder", dtype=dtype)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, batch: Batch, execution: Execution, dtype: Any) -> Float[Array, "P W D"]:
        """The batch's patches of P data shards to their states at ``feature_layer``, without those of the class tokens.

        All images have n patches, so that they lie at multiples of n, and row n · i + j is patch j of image i.
        """
        P, W, E = batch.patches.shape
        n = self.config.side**2
        images = -(-W // n)
        whole = jnp.pad(batch.patches.astype(dtype), ((0, 0), (0, images * n - W), (0, 0)))
        x = self.pre_layrnorm(self.embeddings(whole.reshape(P * images, n, E))).reshape(P, images * (n + 1), -1)
        x = self.encoder(x, Alike(images), execution, self.feature_layer)
        return x.reshape(P, images, n + 1, -1)[:, :, 1:].reshape(P, images * n, -1)[:, :W]
