"""What the Qwen-VL family shares: the module, the values of batches, the reading of the whole config and of Qwen2's text part."""

import dataclasses
from collections.abc import Callable, Mapping
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
from jaxlora.models.image_text import TIES, ImageTextLM
from jaxlora.nn.decoder import Decoder, DecoderConfig, Execution
from jaxlora.nn.vision import VisionConfig, fuse
from jaxlora.typing import Array, Int

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
# Frequencies for time, height and width where a file does not say: those of every released Qwen2-VL and Qwen2.5-VL.
_SECTION = (16, 24, 24)

# The names of Qwen2-VL and Qwen2.5-VL.
RULES = Rules(
    (
        Spelling("hub", (Rename("visual", "model.visual"), Rename("model", "model.language_model"), *same("lm_head"))),
        Spelling("v5", same("model.visual", "model.language_model", "lm_head")),
        Spelling("legacy", (*same("model.visual", "lm_head"), Rename("model.language_model.model", "model.language_model"))),
    ),
    ties=TIES,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVLConfig:
    """The two towers' sizes. The tie flag is the whole model's; the one in ``text`` is not read."""

    text: DecoderConfig
    vision: VisionConfig
    tie_word_embeddings: bool


class QwenVLModel(nnx.Module):
    """The towers, under the paths ``visual`` and ``language_model``."""

    def __init__(self, config: QwenVLConfig, *, tower: Callable[..., Any], path: str, dtype: Any):
        self.visual = tower(config.vision, path=f"{path}.visual", dtype=dtype)
        self.language_model = Decoder(config.text, path=f"{path}.language_model", dtype=dtype)

    def __call__(self, batch: Batch, execution: Execution, *, caches: Any, column: Int[Array, " B"] | None) -> tuple[Array, Any]:
        """Final hidden states; the tower runs where the batch has patches."""
        x, deepstack = self.language_model.embed_tokens(batch.input_ids), None
        if batch.patches is not None:
            features, of_layers = self.visual(batch, execution, x.dtype)
            x = fuse(x, features, batch.vision_index)
            deepstack = None if of_layers is None else (of_layers, batch.vision_index)
        segments = (batch.segment_starts, batch.segment_lengths)
        return self.language_model(x, batch.position_ids, segments, execution, caches=caches, column=column, deepstack=deepstack)


class QwenVL(ImageTextLM):
    """The model and its output head; ``tower`` makes the architecture's vision tower."""

    def __init__(self, config: QwenVLConfig, *, tower: Callable[..., Any], dtype: Any = jnp.bfloat16):
        super().__init__(config, QwenVLModel(config, tower=tower, path="model", dtype=dtype), dtype=dtype)


def read(
    config: Mapping[str, Any], read_text: Callable[[Mapping[str, Any], bool], DecoderConfig], read_vision: Callable[[Any], VisionConfig]
) -> QwenVLConfig:
    """Reads a config.json whose text keys are flat (the hub's files) or in ``text_config`` (transformers 5).

    ``read_text`` gets the text keys and whether the whole model ties its head, ``read_vision`` the ``vision_config``.
    """
    outer, inner = split_text(config, _OUTER)
    whole = take(outer, uses=_OUTER)
    # transformers 4.5x repeats the token ids of the whole model in the text's part, some of them null.
    inner = {key: value for key, value in inner.items() if key not in _OUTER or key == "tie_word_embeddings"}
    decoder, vision = read_text(inner, whole["tie_word_embeddings"]), read_vision(whole["vision_config"])
    sections, faults = sum(decoder.mrope_section or ()), []
    if 2 * sections != decoder.head_dim:
        faults.append(f"mrope_section {decoder.mrope_section} has {sections} frequencies, expected {decoder.head_dim // 2}: half a head")
    if vision.out_features != decoder.hidden_size:
        faults.append(f"the width of the tower's output is {vision.out_features}, the text model's {decoder.hidden_size}")
    raise_all("the configuration does not fit together", faults)
    return QwenVLConfig(text=decoder, vision=vision, tie_word_embeddings=decoder.tie_word_embeddings)


def values_of(
    config: Mapping[str, Any], read_config: Callable[[Mapping[str, Any]], QwenVLConfig], *, frames_apart: bool = False
) -> ModelValues:
    """What batches need, from a config.json."""
    outer, inner = split_text(config, _OUTER)
    whole, sizes = take(outer, uses=_OUTER), read_config(config)
    pads = (part["pad_token_id"] for part in (inner, config) if part.get("pad_token_id") is not None)
    channels, frames, height, width = sizes.vision.patch_shape
    return ModelValues(
        pad_token_id=next(pads, 0),
        vocab_size=sizes.text.vocab_size,
        vision=VisionValues(
            image_token_id=whole["image_token_id"],
            video_token_id=whole["video_token_id"],
            vision_start_token_id=whole["vision_start_token_id"],
            patch_size=sizes.vision.patch_size,
            merge_size=sizes.vision.spatial_merge_size,
            temporal_patch_size=sizes.vision.temporal_patch_size,
            patch_elements=channels * frames * height * width,
            mrope=True,
            tokens_per_second=sizes.vision.tokens_per_second,
            window=sizes.vision.window,
            position_side=sizes.vision.position_side,
            frames_apart=frames_apart,
        ),
    )


def read_qwen2_text(config: Mapping[str, Any], tied: bool) -> DecoderConfig:
    """The text model of Qwen2-VL and Qwen2.5-VL: Qwen2's, with positions of three kinds."""
    windows = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 80, "layer_types": None}
    used = take(config, uses=text.common(rms_norm_eps=1e-5) | windows, requires={"hidden_act": "silu"})
    head_dim = used["hidden_size"] // used["num_attention_heads"]
    if used["head_dim"] not in (None, head_dim):
        raise ValueError(f"head_dim = {used['head_dim']} is not implemented; here it is hidden_size / num_attention_heads = {head_dim}")
    positions = rope(config, theta=1e6)
    if positions.mrope_interleaved:
        raise ValueError("mrope_interleaved = True is not implemented; here sections are chunks")
    positions = dataclasses.replace(positions, mrope_section=positions.mrope_section or _SECTION)
    slides, first = used["use_sliding_window"], used["max_window_layers"]
    layers = text.layer_windows(used, used["sliding_window"] if slides else None, lambda layer: slides and layer >= first)
    # Older files have the flag inside; either place ties.
    return text.sizes(used | {"tie_word_embeddings": tied or used["tie_word_embeddings"]}, positions, layers, qkv_bias=True)


def vision_config(used: Mapping[str, Any], **own: Any) -> VisionConfig:
    """A VisionConfig from the keys that every tower has; ``own`` are the architecture's."""
    turning = take(used["rope_parameters"] or {}, uses={"rope_theta": 1e4}, requires={"rope_type": "axial"})
    same_names = ("depth", "num_heads", "in_channels", "patch_size", "temporal_patch_size", "spatial_merge_size")
    return VisionConfig(**{name: used[name] for name in same_names}, rope_theta=turning["rope_theta"], **own)


def vision_keys(patch_size: int) -> dict[str, Any]:
    """The keys that every tower reads, with the class defaults that apply where a file lacks them."""
    return {
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "rope_parameters": None,
    }


def vision_synonyms(config: Mapping[str, Any], patch_size: int) -> dict[str, Any]:
    """The hub's names for what transformers calls in_channels and patch_size, and the values that they must have."""
    return {"in_chans": config.get("in_channels", 3), "spatial_patch_size": config.get("patch_size", patch_size)}
