"""Qwen2-VL (Wang et al. 2024, arXiv:2409.12191): a vision tower whose features replace tokens of a Qwen2 decoder with M-RoPE."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from conversion.hf_config import REQUIRED, rope, split_text, take
from conversion.rules import Rename, Rules, Spelling, same
from jaxlora.data.batches import Batch, ModelValues
from jaxlora.data.positions import VisionValues
from jaxlora.errors import raise_all
from jaxlora.models import text
from jaxlora.models.spec import ModelSpec
from jaxlora.nn.decoder import Decoder, DecoderConfig, Execution, Head, head_of
from jaxlora.nn.linear import Linear
from jaxlora.nn.vision import VisionConfig, VisionTower, fuse
from jaxlora.typing import Array, Float, Int
from jaxlora.weights.dense import Dense

# Keys of the whole model; all others are the text model's where a file is flat.
_OUTER = {
    "vision_config": REQUIRED,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "tie_word_embeddings": False,
}
# Frequencies for time, height and width where a file does not say: those of every released model.
_SECTION = (16, 24, 24)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2VLConfig:
    """The two towers' sizes. The tie flag is the whole model's; the one in ``text`` is not read."""

    text: DecoderConfig
    vision: VisionConfig
    tie_word_embeddings: bool


class Qwen2VLModel(nnx.Module):
    """The towers, under the paths ``visual`` and ``language_model``."""

    def __init__(self, config: Qwen2VLConfig, *, path: str, dtype: Any):
        self.visual = VisionTower(config.vision, path=f"{path}.visual", dtype=dtype)
        self.language_model = Decoder(config.text, path=f"{path}.language_model", dtype=dtype)

    def __call__(self, batch: Batch, execution: Execution, *, caches: Any, column: Int[Array, " B"] | None) -> tuple[Array, Any]:
        """Final hidden states; the tower runs where the batch has patches."""
        x = self.language_model.embed_tokens(batch.input_ids)
        if batch.patches is not None:
            frames = (batch.patch_segment_starts, batch.patch_segment_lengths)
            x = fuse(x, self.visual(batch.patches.astype(x.dtype), batch.patch_positions, frames, execution), batch.vision_index)
        segments = (batch.segment_starts, batch.segment_lengths)
        return self.language_model(x, batch.position_ids, segments, execution, caches=caches, column=column)


class Qwen2VL(nnx.Module):
    """The model and its output head, under the paths ``model`` and ``lm_head``."""

    def __init__(self, config: Qwen2VLConfig, *, dtype: Any = jnp.bfloat16):
        self.config = config
        self.model = Qwen2VLModel(config, path="model", dtype=dtype)
        self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, dtype=dtype, tied=config.tie_word_embeddings)

    def __call__(
        self, batch: Batch, execution: Execution, *, caches: Any = None, column: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Final hidden states of one micro-batch. In generation, only the prompt's batch has patches."""
        return self.model(batch, execution, caches=caches, column=column)

    def head(self) -> Head:
        """The output head: its own weight, or the embedding's table."""
        return head_of(self.lm_head, self.model.language_model.embed_tokens)

    def embed_table(self) -> Dense:
        """The embedding's table."""
        return self.model.language_model.embed_tokens.table

    def init_caches(self, batch: int, length: int, dtype: Any) -> tuple[Array, Array]:
        """Empty (k, v) caches [L, B, T, K, C]."""
        return text.init_caches(self.config.text, batch, length, dtype)


def read(config: Mapping[str, Any]) -> Qwen2VLConfig:
    """Reads a config.json whose text keys are flat (the hub's files) or in ``text_config`` (transformers 5).

    ``vision_config.embed_dim`` is the tower's width; its ``hidden_size`` is the width of the features, which is the text model's.
    """
    outer, inner = split_text(config, _OUTER)
    whole = take(outer, uses=_OUTER)
    decoder, vision = _read_text(inner, whole["tie_word_embeddings"]), _read_vision(whole["vision_config"])
    sections, faults = sum(decoder.mrope_section or ()), []
    if 2 * sections != decoder.head_dim:
        faults.append(f"mrope_section {decoder.mrope_section} has {sections} frequencies, expected {decoder.head_dim // 2}: half a head")
    if vision.out_features != decoder.hidden_size:
        faults.append(f"vision_config's hidden_size (the tower's output) is {vision.out_features}, the text model's {decoder.hidden_size}")
    raise_all("the configuration does not fit together", faults)
    return Qwen2VLConfig(text=decoder, vision=vision, tie_word_embeddings=decoder.tie_word_embeddings)


def values(config: Mapping[str, Any]) -> ModelValues:
    """What batches need, from a config.json."""
    outer, inner = split_text(config, _OUTER)
    whole, vision = take(outer, uses=_OUTER), read(config).vision
    pads = (part["pad_token_id"] for part in (inner, config) if part.get("pad_token_id") is not None)
    channels, frames, height, width = vision.patch_shape
    return ModelValues(
        pad_token_id=next(pads, 0),
        vocab_size=read(config).text.vocab_size,
        vision=VisionValues(
            image_token_id=whole["image_token_id"],
            video_token_id=whole["video_token_id"],
            vision_start_token_id=whole["vision_start_token_id"],
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            patch_elements=channels * frames * height * width,
            mrope=True,
        ),
    )


def lengthen(config: Qwen2VLConfig, max_seq_length: int) -> Qwen2VLConfig:
    """The config for sequences of that length."""
    return dataclasses.replace(config, text=text.lengthen(config.text, max_seq_length))


def _read_text(config: Mapping[str, Any], tied: bool) -> DecoderConfig:
    windows = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 80, "layer_types": None}
    used = take(config, uses=text.common(rms_norm_eps=1e-5) | windows, requires={"hidden_act": "silu"})
    head_dim = used["hidden_size"] // used["num_attention_heads"]
    if used["head_dim"] not in (None, head_dim):
        raise ValueError(f"head_dim = {used['head_dim']} is not implemented; Qwen2-VL's is hidden_size / num_attention_heads = {head_dim}")
    positions = rope(config, theta=1e6)
    positions = dataclasses.replace(positions, mrope_section=positions.mrope_section or _SECTION)
    slides, first = used["use_sliding_window"], used["max_window_layers"]
    layers = text.layer_windows(used, used["sliding_window"] if slides else None, lambda layer: slides and layer >= first)
    # Older files have the flag inside; either place ties.
    return text.sizes(used | {"tie_word_embeddings": tied or used["tie_word_embeddings"]}, positions, layers, qkv_bias=True)


def _read_vision(config: Mapping[str, Any]) -> VisionConfig:
    channels, patch = config.get("in_channels", 3), config.get("patch_size", 14)
    uses = {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "rope_parameters": None,
    }
    # The hub's names for what transformers calls in_channels and patch_size.
    requires = {"hidden_act": "quick_gelu", "in_chans": channels, "spatial_patch_size": patch}
    used = take(config, uses=uses, requires=requires)
    turning = take(used["rope_parameters"] or {}, uses={"rope_theta": 1e4}, requires={"rope_type": "axial"})
    return VisionConfig(
        depth=used["depth"],
        embed_dim=used["embed_dim"],
        out_features=used["hidden_size"],
        mlp_dim=int(used["embed_dim"] * used["mlp_ratio"]),
        num_heads=used["num_heads"],
        in_channels=used["in_channels"],
        patch_size=used["patch_size"],
        temporal_patch_size=used["temporal_patch_size"],
        spatial_merge_size=used["spatial_merge_size"],
        rope_theta=turning["rope_theta"],
    )


RULES = Rules(
    (
        Spelling("hub", (Rename("visual", "model.visual"), Rename("model", "model.language_model"), *same("lm_head"))),
        Spelling("v5", same("model.visual", "model.language_model", "lm_head")),
        Spelling("legacy", (*same("model.visual", "lm_head"), Rename("model.language_model.model", "model.language_model"))),
    ),
    ties={"lm_head.weight": "model.language_model.embed_tokens.weight"},
)

TINY = {
    "model_type": "qwen2_vl",
    "vocab_size": 331,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 3]},
    "vision_start_token_id": 321,
    "vision_end_token_id": 322,
    "vision_token_id": 323,
    "image_token_id": 324,
    "video_token_id": 325,
    "vision_config": {
        "depth": 2,
        "embed_dim": 40,
        "hidden_size": 72,
        "mlp_ratio": 4,
        "num_heads": 2,
        "in_chans": 3,
        "patch_size": 4,
        "spatial_patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}

SPEC = ModelSpec(
    model_type="qwen2_vl",
    architecture="Qwen2VLForConditionalGeneration",
    read=read,
    build=Qwen2VL,
    rules=RULES,
    values=values,
    lengthen=lengthen,
    tiny=TINY,
)
