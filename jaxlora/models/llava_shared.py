"""What LLaVA and Mistral 3 share: a projector's two layers, the model of two towers, the reading of towers and sparse configurations."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from conversion.hf_config import REQUIRED, split_text, take
from conversion.rules import Rules
from jaxlora.data.batches import Batch
from jaxlora.data.inputs import ModelValues
from jaxlora.data.positions import VisionValues
from jaxlora.models import llama, mistral
from jaxlora.models.image_text import SPELLINGS, TIES, ImageTextLM
from jaxlora.nn.clip import ClipTower
from jaxlora.nn.decoder import Decoder, DecoderConfig, Execution
from jaxlora.nn.linear import Linear
from jaxlora.nn.mlp import two_linears
from jaxlora.nn.pixtral import PixtralConfig, PixtralTower
from jaxlora.nn.siglip import SiglipConfig, SiglipTower
from jaxlora.nn.stack import fold_path
from jaxlora.nn.vision import fuse
from jaxlora.typing import Array, Float, Int, PRNGKeyArray

# SigLIP's own pooling head is no part of the model.
RULES = Rules(SPELLINGS, ignore=("*vision_tower.vision_model.head.*", "*vision_tower.head.*"), ties=TIES)
# Change what a processor does, or nothing.
INERT = ("ignore_index", "image_seq_length", "is_composition")
TOWERS = {"clip_vision_model": ClipTower, "siglip_vision_model": SiglipTower, "pixtral": PixtralTower}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """The two towers' sizes. The features are the tower's states that enter ``feature_layer``, of ``merge`` x ``merge`` patches each."""

    text: DecoderConfig
    vision: SiglipConfig | PixtralConfig
    tower: str
    feature_layer: int
    projector_bias: bool
    tie_word_embeddings: bool
    merge: int = 1


def unused(config: "LlavaConfig", path: str) -> bool:
    """Whether a Linear belongs to a layer of the tower behind the one whose state is taken."""
    layer = re.search(r"vision_tower\..*layers\.(\d+)\.", path)
    return layer is not None and int(layer[1]) >= config.feature_layer


def two_layers(config: LlavaConfig, dtype: Any) -> tuple[Linear, Linear]:
    """The projector's linear_1 and linear_2: from the tower's width to the decoder's."""
    tower, width = config.vision.hidden_size, config.text.hidden_size
    return Linear(tower, width, bias=config.projector_bias, dtype=dtype), Linear(width, width, bias=config.projector_bias, dtype=dtype)


def run_two_layers(layers: tuple[Linear, Linear], x: Float[Array, "P F D"], path: str, key: PRNGKeyArray | None) -> Float[Array, "P F O"]:
    """linear_2(gelu(linear_1 x)) of the projector at ``path``; ``key`` is the forward pass's, before a path is folded in."""
    keys = [None if key is None else fold_path(key, f"{path}.{name}") for name in ("linear_1", "linear_2")]
    return two_linears(*layers, x, "gelu", keys)


class Projector(nnx.Module):
    """linear_2(gelu(linear_1 x))."""

    def __init__(self, config: LlavaConfig, *, path: str, dtype: Any):
        self.path = path
        self.linear_1, self.linear_2 = two_layers(config, dtype)

    def __call__(self, x: Float[Array, "P W D"], key: PRNGKeyArray | None) -> Float[Array, "P W O"]:
        """``key`` is the forward pass's, before a path is folded in."""
        return run_two_layers((self.linear_1, self.linear_2), x, self.path, key)


class LlavaModel(nnx.Module):
    """The towers, under the paths ``vision_tower``, ``multi_modal_projector`` (made by ``projector``) and ``language_model``."""

    def __init__(self, config: LlavaConfig, *, projector: Callable[..., nnx.Module], path: str, dtype: Any):
        tower = TOWERS[config.tower]
        self.vision_tower = tower(config.vision, feature_layer=config.feature_layer, path=f"{path}.vision_tower", dtype=dtype)
        self.multi_modal_projector: Any = projector(config, path=f"{path}.multi_modal_projector", dtype=dtype)
        self.language_model = Decoder(config.text, path=f"{path}.language_model", dtype=dtype)

    def __call__(self, batch: Batch, execution: Execution, *, caches: Any, column: Int[Array, " B"] | None) -> tuple[Array, Any]:
        """Final hidden states; the tower runs where the batch has patches."""
        x = self.language_model.embed_tokens(batch.input_ids)
        if batch.patches is not None:
            features = self.multi_modal_projector(self.vision_tower(batch, execution, x.dtype), execution.dropout_key)
            x = fuse(x, features, batch.vision_index)
        segments = (batch.segment_starts, batch.segment_lengths)
        return self.language_model(x, batch.position_ids, segments, execution, caches=caches, column=column)


class Llava(ImageTextLM):
    """The model and its output head."""

    def __init__(self, config: LlavaConfig, *, projector: Callable[..., nnx.Module] = Projector, dtype: Any = jnp.bfloat16):
        super().__init__(config, LlavaModel(config, projector=projector, path="model", dtype=dtype), dtype=dtype)


# The sizes of transformers' classes, which the hub's files leave out.
_TEXT = {
    "llama": (
        llama.read,
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "mistral": (
        mistral.read,
        {
            **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
            **{"num_attention_heads": 32, "num_key_value_heads": 8},
        },
    ),
}


def read_text(config: Mapping[str, Any], *, tied: bool) -> DecoderConfig:
    """The text model that ``model_type`` names (Llama's where there is none)."""
    kind = config.get("model_type", "llama")
    if kind not in _TEXT:
        raise NotImplementedError(f"text_config is of model_type {kind!r}; as a part of this model there are {', '.join(_TEXT)}")
    read, sizes = _TEXT[kind]
    given = {key: value for key, value in config.items() if key not in INERT}
    return read({**sizes, **given, "tie_word_embeddings": tied})


def read_vision(config: Mapping[str, Any]) -> tuple[str, SiglipConfig | PixtralConfig]:
    """(model_type, sizes) of the vision tower."""
    kind = config.get("model_type", "clip_vision_model")
    if kind not in TOWERS:
        raise NotImplementedError(f"vision_config is of model_type {kind!r}; there are {', '.join(TOWERS)}")
    given = {key: value for key, value in config.items() if key not in INERT}
    if kind == "pixtral":
        return kind, _read_pixtral(given)
    clip = kind == "clip_vision_model"
    uses = {
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3},
        **{"image_size": 224, "patch_size": 32 if clip else 16, "layer_norm_eps": 1e-5 if clip else 1e-6},
        "hidden_act": "quick_gelu" if clip else "gelu_pytorch_tanh",
    }
    # The projection into the space of CLIP's texts, SigLIP's pooling head, and a number of tokens that no tower has.
    inert = ("projection_dim", "vision_use_head", "vocab_size", "tie_word_embeddings")
    return kind, SiglipConfig(**take(given, uses=uses, inert=inert))


def _read_pixtral(config: Mapping[str, Any]) -> PixtralConfig:
    uses = {
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "num_channels": 3},
        **{"patch_size": 16, "hidden_act": "gelu", "rope_parameters": None, "rope_theta": None, "head_dim": None},
    }
    # How large an image may be is the processor's business.
    used = take(config, uses=uses, inert=("image_size", "vocab_size", "tie_word_embeddings"))
    turning = take(used.pop("rope_parameters") or {}, uses={"rope_theta": used["rope_theta"] or 1e4}, requires={"rope_type": "axial"})
    if used.pop("hidden_act") != "silu":
        raise ValueError(f"hidden_act = {config.get('hidden_act', 'gelu')!r} is not implemented in Pixtral's tower; expected 'silu'")
    head_dim = used.pop("head_dim")
    sizes = PixtralConfig(**{**used, **turning})
    if head_dim not in (None, sizes.head_dim):
        raise ValueError(f"head_dim = {head_dim} is not implemented; here it is hidden_size / num_attention_heads = {sizes.head_dim}")
    return sizes


def feature_layer(given: Any, layers: int) -> int:
    """The layer whose input is state ``given`` of the tower's layers + 1 states, counted from the end where it is negative.

    >>> feature_layer(-2, 24)
    23
    """
    if not isinstance(given, int) or not -layers - 1 <= given <= layers:
        raise ValueError(f"vision_feature_layer = {given} is not implemented; expected one of the {layers + 1} states of {layers} layers")
    return given if given >= 0 else layers + 1 + given


def values(config: Mapping[str, Any], sizes: LlavaConfig, *, image_token: int) -> ModelValues:
    """What batches need; ``image_token`` is the placeholder where the file names none."""
    named = (config.get("image_token_index"), config.get("image_token_id"), image_token)
    image = next(token for token in named if token is not None)
    inner = config.get("text_config") or {}
    pads = (part["pad_token_id"] for part in (config, inner) if part.get("pad_token_id") is not None)
    vision = sizes.vision
    seen = VisionValues(
        image_token_id=image,
        patch_size=vision.patch_size,
        merge_size=sizes.merge,
        patch_elements=vision.num_channels * vision.patch_size**2,
        grid=(1, vision.side, vision.side) if isinstance(vision, SiglipConfig) else None,
        row_breaks=isinstance(vision, PixtralConfig),
    )
    # The placeholder's own row is never looked up, and need not exist.
    return ModelValues(pad_token_id=next(pads, 0), vocab_size=max(sizes.text.vocab_size, image + 1), vision=seen)


def outer_keys(**own: object) -> dict[str, object]:
    """The keys of the whole model, with the defaults of transformers' class in ``own``."""
    return {"vision_config": REQUIRED, "image_token_id": None, "vision_feature_layer": -1, "projector_hidden_act": "gelu", **own}


def take_whole(config: Mapping[str, Any], outer: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the whole model's keys, the text model's)."""
    whole, inner = split_text(config, {*outer, *INERT})
    uses = {key: default for key, default in outer.items() if key != "projector_hidden_act"}
    return take(whole, uses=uses, requires={"projector_hidden_act": "gelu"}, inert=INERT), inner
