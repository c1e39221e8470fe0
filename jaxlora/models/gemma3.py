"""Gemma 3 with images (Gemma Team 2025, arXiv:2503.19786): SigLIP's patches, averaged and projected, replace tokens of the decoder.

The tokens of one image see each other both ways, in the sliding layers within their window.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from conversion.hf_config import REQUIRED, split_text, take
from conversion.rules import Rules
from jaxlora.data.batches import Batch
from jaxlora.data.inputs import ModelValues
from jaxlora.data.positions import VisionValues
from jaxlora.errors import raise_all
from jaxlora.models import gemma3_text, gemma_shared
from jaxlora.models.image_text import SPELLINGS, TIES, ImageTextLM, lengthen
from jaxlora.models.spec import ModelSpec
from jaxlora.nn.decoder import Decoder, DecoderConfig, Execution
from jaxlora.nn.norm import CentredRMSNorm
from jaxlora.nn.siglip import SiglipConfig, SiglipTower
from jaxlora.nn.vision import fuse
from jaxlora.typing import Array, Float, Int
from jaxlora.weights.base import abstract

# Keys of the whole model; transformers' older and newer names of the tokens.
_OUTER = {
    "vision_config": REQUIRED,
    "mm_tokens_per_image": 256,
    "image_token_index": 262144,
    "image_token_id": None,
    "boi_token_index": 255999,
    "boi_token_id": None,
    "eoi_token_index": 256000,
    "eoi_token_id": None,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config:
    """The two towers' sizes; ``merge`` x ``merge`` patches are averaged into one feature."""

    text: DecoderConfig
    vision: SiglipConfig
    merge: int
    tie_word_embeddings: bool


class Projector(nnx.Module):
    """norm(mean of a merge block) · W, with W [in, out] as it is on disk: a parameter, no ``Linear``."""

    def __init__(self, config: Gemma3Config, *, dtype: Any):
        self.merged = config.merge**2
        sizes = config.vision.hidden_size, config.text.hidden_size
        self.mm_input_projection_weight: nnx.Param[Any] = nnx.Param(abstract(sizes, dtype))
        self.mm_soft_emb_norm = CentredRMSNorm(sizes[0], eps=config.vision.layer_norm_eps, dtype=dtype)

    def __call__(self, x: Float[Array, "P W D"]) -> Float[Array, "P F O"]:
        """[P, W, D] to [P, W / merge², O]; the patches of a block are consecutive.

        Raises:
          ValueError: W is no multiple of merge².
        """
        P, W, D = x.shape
        if W % self.merged:
            raise ValueError(f"room for {W} patches a shard, which is no multiple of the {self.merged} in one feature")
        pooled = jnp.mean(x.reshape(P, W // self.merged, self.merged, D).astype(jnp.float32), axis=2).astype(x.dtype)
        weight = self.mm_input_projection_weight.get_value().astype(x.dtype)
        return jnp.einsum("pfi,io->pfo", self.mm_soft_emb_norm(pooled), weight, preferred_element_type=jnp.float32).astype(x.dtype)


class Gemma3Model(nnx.Module):
    """The towers, under the paths ``vision_tower``, ``multi_modal_projector`` and ``language_model``."""

    def __init__(self, config: Gemma3Config, *, path: str, dtype: Any):
        self.vision_tower = SiglipTower(config.vision, path=f"{path}.vision_tower", dtype=dtype)
        self.multi_modal_projector = Projector(config, dtype=dtype)
        self.language_model = Decoder(config.text, path=f"{path}.language_model", dtype=dtype)

    def __call__(self, batch: Batch, execution: Execution, *, caches: Any, column: Int[Array, " B"] | None) -> tuple[Array, Any]:
        """Final hidden states; the tower runs where the batch has patches. Its features are not scaled as embeddings are."""
        x = self.language_model.embed_tokens(batch.input_ids)
        reach = None
        if batch.patches is not None:
            features = self.multi_modal_projector(self.vision_tower(batch, execution, x.dtype))
            x, reach = fuse(x, features, batch.vision_index), image_ends(batch.vision_index)
        segments = (batch.segment_starts, batch.segment_lengths)
        return self.language_model(x, batch.position_ids, segments, execution, caches=caches, column=column, reach=reach)


def image_ends(index: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """One past the last token of the run of image tokens (those with an index) that a token is in; 0 for text.

    >>> image_ends(jnp.array([[-1, 0, 1, -1, 2, 3]])).tolist()
    [[0, 3, 3, 0, 6, 6]]
    """
    columns = jnp.broadcast_to(jnp.arange(index.shape[1], dtype=jnp.int32)[None], index.shape)
    ends = jax.lax.cummin(jnp.where(index < 0, columns, index.shape[1]), axis=1, reverse=True)
    return jnp.where(index < 0, 0, ends)


class Gemma3(ImageTextLM):
    """The model and its output head."""

    def __init__(self, config: Gemma3Config, *, dtype: Any = jnp.bfloat16):
        super().__init__(config, Gemma3Model(config, path="model", dtype=dtype), dtype=dtype)


def read(config: Mapping[str, Any]) -> Gemma3Config:
    """Reads a config.json. Whether the head is tied is the whole model's flag; the head's soft-cap must be null."""
    outer, inner = split_text(config, _OUTER)
    whole = take(outer, uses=_OUTER)
    decoder = gemma3_text.read({**inner, "tie_word_embeddings": whole["tie_word_embeddings"]})
    vision, tokens = _read_vision(whole["vision_config"]), whole["mm_tokens_per_image"]
    faults, side = [], math.isqrt(tokens)
    if side**2 != tokens or vision.side % side:
        faults.append(f"mm_tokens_per_image={tokens} must be a square that divides the {vision.side} x {vision.side} patches of an image")
    if decoder.final_logit_softcapping is not None:
        faults.append(f"final_logit_softcapping = {decoder.final_logit_softcapping} is not implemented; transformers does not apply it")
    raise_all("the configuration does not fit together", faults)
    return Gemma3Config(text=decoder, vision=vision, merge=vision.side // side, tie_word_embeddings=decoder.tie_word_embeddings)


def values(config: Mapping[str, Any]) -> ModelValues:
    """What batches need, from a config.json."""
    outer, inner = split_text(config, _OUTER)
    whole, sizes = take(outer, uses=_OUTER), read(config)
    of_text = gemma_shared.values({**config, **inner}, sizes.text)
    image = whole["image_token_index"] if whole["image_token_id"] is None else whole["image_token_id"]
    vision = sizes.vision
    seen = VisionValues(
        image_token_id=image,
        patch_size=vision.patch_size,
        merge_size=sizes.merge,
        patch_elements=vision.num_channels * vision.patch_size**2,
        grid=(1, vision.side, vision.side),
    )
    # The placeholder's own row is never looked up, and need not exist.
    return dataclasses.replace(of_text, vocab_size=max(sizes.text.vocab_size, image + 1), vision=seen)


def _read_vision(config: Mapping[str, Any]) -> SiglipConfig:
    uses = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    }
    # A file may hold SigLIP's own pooling head, which nothing here uses.
    used = take(config, uses=uses, requires={"hidden_act": "gelu_pytorch_tanh"}, inert=("vision_use_head",))
    return SiglipConfig(**used)


RULES = Rules(SPELLINGS, ignore=("*vision_tower.vision_model.head.*", "*vision_tower.head.*"), ties=TIES)

TINY = {
    "model_type": "gemma3",
    "mm_tokens_per_image": 9,
    "image_token_index": 324,
    "boi_token_index": 322,
    "eoi_token_index": 323,
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": 331,
        "hidden_size": 44,
        "intermediate_size": 76,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "rms_norm_eps": 1e-5,
        "query_pre_attn_scalar": 10,
        "sliding_window": 7,
        "sliding_window_pattern": 3,
        "max_position_embeddings": 512,
        "rope_theta": 1e5,
        "rope_local_base_freq": 1e2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 24,
        "patch_size": 4,
        "vision_use_head": False,
    },
}

SPEC = ModelSpec(
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    read=read,
    build=Gemma3,
    rules=RULES,
    values=values,
    lengthen=lengthen,
    tiny=TINY,
)
