"""Llama 3.2 Vision (Llama Team 2024, arXiv:2407.21783, section 7): a Llama whose every fifth layer attends to the tiles of images."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from conversion.hf_config import REQUIRED, rope, split_text, take
from conversion.rules import Rename, Rules, Spelling, same
from jaxlora.data.batches import Batch
from jaxlora.data.inputs import ModelValues
from jaxlora.data.positions import VisionValues
from jaxlora.errors import raise_all
from jaxlora.models import text
from jaxlora.models.spec import ModelSpec
from jaxlora.nn.attention import Vision
from jaxlora.nn.cross import CrossLayer
from jaxlora.nn.decoder import Decoder, DecoderConfig, DecoderLayer, Execution, Head, head_of
from jaxlora.nn.linear import Linear
from jaxlora.nn.stack import fold_path
from jaxlora.nn.tiles import TilesConfig, TilesTower
from jaxlora.select import layers_of
from jaxlora.typing import Array, Float, Int
from jaxlora.weights.dense import Dense

_OUTER = {"vision_config": REQUIRED, "image_token_index": 128256, "image_token_id": None, "tie_word_embeddings": False}
# Rows of the embedding that the head does not have: the image's token and seven to spare.
_EXTRA_ROWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class MllamaConfig:
    """The two towers' sizes. ``text.vocab_size`` counts the embedding's rows, ``head_size`` the head's; they are never tied."""

    text: DecoderConfig
    vision: TilesConfig
    cross_attention_layers: tuple[int, ...]
    head_size: int
    tie_word_embeddings: bool = False


class MllamaModel(nnx.Module):
    """The towers, under the paths ``vision_model``, ``multi_modal_projector`` and ``language_model``."""

    def __init__(self, config: MllamaConfig, *, path: str, dtype: Any):
        self.path = path
        self.vision_model = TilesTower(config.vision, path=f"{path}.vision_model", dtype=dtype)
        self.multi_modal_projector = Linear(config.vision.features, config.text.hidden_size, bias=True, dtype=dtype)
        blocks = [
            CrossLayer(config.text, dtype=dtype)
            if i in config.cross_attention_layers
            else DecoderLayer(config.text, window=None, dtype=dtype)
            for i in range(config.text.num_hidden_layers)
        ]
        self.language_model = Decoder(config.text, path=f"{path}.language_model", blocks=blocks, dtype=dtype)

    def __call__(self, batch: Batch, execution: Execution, *, caches: Any, column: Int[Array, " B"] | None) -> tuple[Array, Any]:
        """Final hidden states; without images the cross-attention layers are skipped."""
        x = self.language_model.embed_tokens(batch.input_ids)
        vision = None
        if batch.seen_starts is not None:
            states = None if batch.patches is None else self.vision_states(batch, execution, x.dtype)
            vision = Vision(states, batch.seen_starts, batch.seen_lengths)
        segments = (batch.segment_starts, batch.segment_lengths)
        return self.language_model(x, batch.position_ids, segments, execution, caches=caches, column=column, vision=vision)

    def vision_states(self, batch: Batch, execution: Execution, dtype: Any) -> Float[Array, "P V D"]:
        """Projected features of all tiles of a data shard, in the order in which the batch has its tokens see them."""
        features = self.vision_model(batch, execution, dtype)
        key = None if execution.dropout_key is None else fold_path(execution.dropout_key, f"{self.path}.multi_modal_projector")
        states = self.multi_modal_projector(features, key)
        tiles = states.reshape(*batch.tile_order.shape, -1, states.shape[2])
        return jnp.take_along_axis(tiles, batch.tile_order[:, :, None, None], axis=1).reshape(states.shape)


class Mllama(nnx.Module):
    """The model and its output head, under the paths ``model`` and ``lm_head``."""

    def __init__(self, config: MllamaConfig, *, dtype: Any = jnp.bfloat16):
        self.config = config
        self.model = MllamaModel(config, path="model", dtype=dtype)
        self.lm_head = Linear(config.text.hidden_size, config.head_size, dtype=dtype)

    def __call__(
        self, batch: Batch, execution: Execution, *, caches: Any = None, column: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Final hidden states of one micro-batch. In generation, only the prompt's batch has patches."""
        return self.model(batch, execution, caches=caches, column=column)

    def head(self) -> Head:
        """The output head."""
        return head_of(self.lm_head, self.model.language_model.embed_tokens)

    def embed_table(self) -> Dense:
        """The embedding's table."""
        return self.model.language_model.embed_tokens.table

    def init_caches(self, batch: int, length: int, dtype: Any) -> dict[str, Any]:
        """Empty (k, v) caches [n, B, T, K, C] of n stacked self-attention layers; those of cross-attention come with the prompt."""
        text, layers = self.config.text, self.model.language_model.layers

        def empty(key: str) -> Any:
            if isinstance(getattr(layers, key), CrossLayer):
                return None
            count = len(layers_of(key))
            return (jnp.zeros((count, batch, length, text.num_key_value_heads, text.head_dim), dtype),) * 2

        return {key: empty(key) for key in layers.keys}


def read(config: Mapping[str, Any]) -> MllamaConfig:
    """Reads a config.json; the embedding has 8 rows more than ``vocab_size``."""
    outer, inner = split_text(config, _OUTER)
    whole = take(
        outer, uses={key: value for key, value in _OUTER.items() if key != "tie_word_embeddings"}, requires={"tie_word_embeddings": False}
    )
    defaults = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "cross_attention_layers": None,
    }
    uses = {**text.common(rms_norm_eps=1e-5, max_position_embeddings=131072), **defaults}
    # transformers' attention derives it, whatever the file says.
    del uses["head_dim"], uses["tie_word_embeddings"]
    used = take(inner, uses=uses, requires={"hidden_act": "silu", "dropout": 0, "tie_word_embeddings": False})
    depth, crossing = used["num_hidden_layers"], used["cross_attention_layers"]
    crossing = range(3, 39, 5) if crossing is None else crossing
    used |= {"head_dim": None, "tie_word_embeddings": False, "vocab_size": used["vocab_size"] + _EXTRA_ROWS}
    return MllamaConfig(
        text=text.sizes(used, rope(inner, theta=5e5), (None,) * depth),
        vision=_read_vision(whole["vision_config"]),
        cross_attention_layers=tuple(i for i in range(depth) if i in crossing),
        head_size=used["vocab_size"] - _EXTRA_ROWS,
    )


def _read_vision(config: Mapping[str, Any]) -> TilesConfig:
    uses = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_global_layers": 8,
        "attention_heads": 16,
        "num_channels": 3,
        "image_size": 448,
        "patch_size": 14,
        "norm_eps": 1e-5,
        "max_num_tiles": 4,
        "vision_output_dim": 7680,
        "intermediate_layers_indices": None,
        "supported_aspect_ratios": None,
    }
    used = take(config, uses=uses, requires={"hidden_act": "gelu"})
    ratios = used.pop("supported_aspect_ratios") or ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
    layers = used.pop("intermediate_layers_indices")
    width = used.pop("vision_output_dim")
    made = TilesConfig(
        **used,
        intermediate_layers=(3, 7, 15, 23, 30) if layers is None else tuple(layers),
        aspect_ratios=tuple((int(a), int(b)) for a, b in ratios),
    )
    wrong = (
        [f"vision_output_dim={width}, but the states that are collected have {made.features} channels"] if width != made.features else []
    )
    raise_all("the configuration does not fit together", wrong)
    return made


def values(config: Mapping[str, Any]) -> ModelValues:
    """What batches need, from a config.json."""
    outer, inner = split_text(config, _OUTER)
    whole, sizes = take(outer, uses=_OUTER), read(config)
    image = whole["image_token_index"] if whole["image_token_id"] is None else whole["image_token_id"]
    vision, pad = sizes.vision, inner.get("pad_token_id", 128004)
    side = vision.image_size // vision.patch_size
    return ModelValues(
        pad_token_id=0 if pad is None else pad,
        vocab_size=sizes.text.vocab_size,
        head_size=sizes.head_size,
        vision=VisionValues(
            image_token_id=image,
            patch_size=vision.patch_size,
            patch_elements=vision.num_channels * vision.patch_size**2,
            grid=(vision.max_num_tiles, side, side),
            tiles=(1, *(a * b for a, b in vision.aspect_ratios)),
        ),
    )


def lengthen(config: MllamaConfig, max_seq_length: int) -> MllamaConfig:
    """The config for sequences of that length."""
    return dataclasses.replace(config, text=text.lengthen(config.text, max_seq_length))


_PARTS = ("model.vision_model", "model.multi_modal_projector", "model.language_model", "lm_head")
RULES = Rules(
    (
        Spelling(
            "hub",
            (
                Rename("vision_model", "model.vision_model"),
                Rename("multi_modal_projector", "model.multi_modal_projector"),
                Rename("language_model.model", "model.language_model"),
                Rename("language_model.lm_head", "lm_head"),
            ),
        ),
        Spelling("v5", same(*_PARTS)),
    )
)

TINY = {
    "model_type": "mllama",
    "image_token_index": 331,
    "text_config": {
        "model_type": "mllama_text_model",
        "vocab_size": 331,
        "hidden_size": 60,
        "intermediate_size": 76,
        "num_hidden_layers": 7,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 4],
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "pad_token_id": 3,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "vision_config": {
        "model_type": "mllama_vision_model",
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_hidden_layers": 4,
        "num_global_layers": 2,
        "attention_heads": 3,
        "image_size": 16,
        "patch_size": 4,
        "intermediate_layers_indices": [1, 2],
        "vision_output_dim": 108,
    },
}

SPEC = ModelSpec(
    model_type="mllama",
    architecture="MllamaForConditionalGeneration",
    read=read,
    build=Mllama,
    rules=RULES,
    values=values,
    lengthen=lengthen,
    tiny=TINY,
)
