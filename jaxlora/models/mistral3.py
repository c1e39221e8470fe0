"""Mistral 3 (Mistral Small 3.1, 3.2 and their kin): Pixtral's tower, m x m of its patches merged into each feature."""

import functools
from collections.abc import Mapping
from typing import Any

from flax import nnx

from jaxlora.data.inputs import ModelValues
from jaxlora.models import llava_shared
from jaxlora.models.image_text import lengthen
from jaxlora.models.llava_shared import LlavaConfig
from jaxlora.models.spec import ModelSpec
from jaxlora.nn.linear import Linear
from jaxlora.nn.norm import RMSNorm
from jaxlora.nn.stack import fold_path
from jaxlora.typing import Array, Float, PRNGKeyArray

_IMAGE_TOKEN = 10
_OUTER = llava_shared.outer_keys(
    image_token_index=_IMAGE_TOKEN,
    multimodal_projector_bias=False,
    spatial_merge_size=2,
    # Files on the hub say nothing and hold a head of their own; loading finds that it differs, and unties.
    tie_word_embeddings=True,
)


class PatchMerger(nnx.Module):
    """merging_layer [x_1 … x_m²]: one state of the m² neighbours of a merge block, which are consecutive rows."""

    def __init__(self, config: LlavaConfig, *, dtype: Any):
        self.merged = config.merge**2
        self.merging_layer = Linear(config.vision.hidden_size * self.merged, config.vision.hidden_size, dtype=dtype)

    def __call__(self, x: Float[Array, "P W D"], key: PRNGKeyArray | None) -> Float[Array, "P F D"]:
        """[P, W, D] to [P, W / m², D].

        Raises:
          ValueError: W is no multiple of m².
        """
        P, W, D = x.shape
        if W % self.merged:
            raise ValueError(f"room for {W} patches a shard, which is no multiple of the {self.merged} in one feature")
        # The weight's columns count (channel, row, column), so that a channel's m² values are neighbours.
        blocks = x.reshape(P, W // self.merged, self.merged, D).swapaxes(2, 3)
        return self.merging_layer(blocks.reshape(P, W // self.merged, D * self.merged), key)


class Projector(nnx.Module):
    """linear_2(gelu(linear_1(patch_merger(norm x)))); the norm's epsilon is the text model's."""

    def __init__(self, config: LlavaConfig, *, path: str, dtype: Any):
        self.path = path
        self.norm = RMSNorm(config.vision.hidden_size, eps=config.text.rms_norm_eps, dtype=dtype)
        self.patch_merger = PatchMerger(config, dtype=dtype)
        self.linear_1, self.linear_2 = llava_shared.two_layers(config, dtype)

    def __call__(self, x: Float[Array, "P W D"], key: PRNGKeyArray | None) -> Float[Array, "P F O"]:
        """[P, W, D] to [P, W / m², O]; ``key`` is the forward pass's, before a path is folded in."""
        merged = self.patch_merger(self.norm(x), None if key is None else fold_path(key, f"{self.path}.patch_merger.merging_layer"))
        return llava_shared.run_two_layers((self.linear_1, self.linear_2), merged, self.path, key)


def read(config: Mapping[str, Any]) -> LlavaConfig:
    """Reads a config.json. Whether the head is tied is the whole model's flag.

    Raises:
      NotImplementedError: another tower than Pixtral's.
    """
    whole, inner = llava_shared.take_whole(config, _OUTER)
    named = whole["vision_config"].get("model_type", "pixtral")
    if named != "pixtral":
        raise NotImplementedError(f"vision_config is of model_type {named!r}; mistral3 is modelled with the tower 'pixtral' alone")
    tower, vision = llava_shared.read_vision({**whole["vision_config"], "model_type": named})
    decoder = llava_shared.read_text({"model_type": "mistral", **inner}, tied=whole["tie_word_embeddings"])
    return LlavaConfig(
        text=decoder,
        vision=vision,
        tower=tower,
        feature_layer=llava_shared.feature_layer(whole["vision_feature_layer"], vision.num_hidden_layers),
        projector_bias=whole["multimodal_projector_bias"],
        tie_word_embeddings=decoder.tie_word_embeddings,
        merge=whole["spatial_merge_size"],
    )


def values(config: Mapping[str, Any]) -> ModelValues:
    """What batches need, from a config.json."""
    return llava_shared.values(config, read(config), image_token=_IMAGE_TOKEN)


TINY = {
    "model_type": "mistral3",
    "image_token_index": 324,
    "pad_token_id": 3,
    "spatial_merge_size": 2,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 331,
        "hidden_size": 44,
        "intermediate_size": 76,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "rms_norm_eps": 0.03,
        "sliding_window": 9,
        "max_position_embeddings": 512,
        "rope_theta": 1e4,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 40,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 20,
        "image_size": 48,
        "patch_size": 4,
        "hidden_act": "silu",
        "rope_theta": 1e2,
    },
}

SPEC = ModelSpec(
    model_type="mistral3",
    architecture="Mistral3ForConditionalGeneration",
    read=read,
    build=functools.partial(llava_shared.Llava, projector=Projector),
    rules=llava_shared.RULES,
    values=values,
    lengthen=lengthen,
    tiny=TINY,
    unused=llava_shared.unused,
)
