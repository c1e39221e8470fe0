"""Reads a Hugging Face config.json strictly: every key is used, checked, or known to change nothing.

A key that a model ignores is how a checkpoint is loaded wrong without a word, so an unknown key is an error, and each
architecture says which keys it uses and which values it requires. Old and new spellings become one record here.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Final

from conversion._faults import nearest, raise_all

REQUIRED: Final = object()

# Change neither the forward pass nor the gradient of a decoder or a tower, whatever their value.
INERT = frozenset(
    # provenance, and what is decided per tensor (quantization_config), never executed (auto_map), or read on its own (dtype)
    "_name_or_path _commit_hash _attn_implementation architectures transformers_version model_type auto_map custom_pipelines "
    "torch_dtype dtype quantization_config unsloth_version unsloth_fixed base_model_config "
    "attn_implementation _attn_implementation_autoset "
    # how parameters were drawn, or a product was split, before training
    "initializer_range initializer_factor pretraining_tp chunk_size_feed_forward gradient_checkpointing "
    # tokens and generation: the tokenizer's and the generation config's business
    "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id tokenizer_class "
    "prefix use_cache cache_implementation max_length min_length do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    # what a call returns, roles and heads that language models do not have
    "return_dict output_hidden_states output_attentions output_scores return_dict_in_generate torchscript use_bfloat16 "
    "tf_legacy_loss is_decoder finetuning_task id2label label2id num_labels problem_type task_specific_params".split()
)
# Change the model, but have one value in every architecture here; attention dropout acts in training, where it is not modelled.
FIXED: Mapping[str, object] = {
    "attention_dropout": 0.0,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
}
# Where an outer and an inner configuration may differ: of tied embeddings the outer one is believed.
_OWN = frozenset({"tie_word_embeddings"})
_ROPE_KEYS = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate".split()
    ),
}
_ROPE_ALWAYS = {"type", "rope_type", "rope_theta", "mrope_section", "mrope_interleaved", "partial_rotary_factor"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: base ``theta`` and the ``kind`` of frequency scaling, with the parameters that it has.

    ``kind`` is "default", "linear", "dynamic", "llama3" or "yarn"; ``original_max_positions`` is the length that was
    trained before scaling; ``mrope_section`` the number of frequencies for time, height and width (Qwen-VL).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    mrope_section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False
    partial_rotary_factor: float = 1.0


def take(
    config: Mapping[str, Any],
    *,
    uses: Mapping[str, object],
    requires: Mapping[str, object] | None = None,
    inert: Collection[str] = (),
) -> dict[str, Any]:
    """Returns the keys of ``uses``, with their defaults where they are absent (``REQUIRED``: there is none).

    ``requires`` gives the one value, or the tuple of values, that the model implements; an absent key has it. ``inert`` adds
    to ``INERT``, and ``FIXED`` is required too where the caller says nothing about a key. Unknown keys that are null ask for nothing.

    >>> config = {"hidden_size": 8, "hidden_act": "silu", "use_cache": True}
    >>> take(config, uses={"hidden_size": REQUIRED, "head_dim": None}, requires={"hidden_act": "silu"})
    {'hidden_size': 8, 'head_dim': None}

    Raises:
      ValueError: listing every unknown key with the nearest known one, every required key with another value, and every
        missing key.
    """
    required = {**{k: v for k, v in FIXED.items() if k not in uses and k not in inert}, **(requires or {})}
    known = {*uses, *required, *inert, *INERT}
    unknown = [k for k in config if k not in known and config[k] is not None]
    faults = [f"{k} = {_short(config[k])} is unknown, and may change the model{nearest(k, known - INERT)}" for k in unknown]
    for key, allowed in required.items():
        values = allowed if isinstance(allowed, tuple) else (allowed,)
        if key in config and not any(_equal(config[key], value) for value in values):
            faults.append(f"{key} = {_short(config[key])} is not implemented; expected {' or '.join(_short(v) for v in values)}")
    faults += [f"{k} is missing{nearest(k, unknown)}" for k, default in uses.items() if default is REQUIRED and config.get(k) is None]
    raise_all(f"{config.get('model_type', 'the model')}'s configuration has {len(faults)} faults", faults)
    return {k: config.get(k, default) if default is not REQUIRED else config[k] for k, default in uses.items()}


def split_text(config: Mapping[str, Any], outer: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the (outer, text) configurations of a vision-language model, whose text keys are nested or, in old files, flat.

    ``outer`` names the keys that are the whole model's (``vision_config``, ``image_token_id``, ``tie_word_embeddings``, …). In a
    file that has text keys in both places, the nested ones count; null there is no contradiction (transformers 4.5x writes a
    ``sliding_window`` that is not used so).

    >>> split_text({"vision_config": {}, "hidden_size": 8}, ["vision_config"])
    ({'vision_config': {}}, {'hidden_size': 8})

    Raises:
      ValueError: listing every key that has different values in both places.
    """
    whole = {k: v for k, v in config.items() if k in outer or k in INERT}
    flat = {k: v for k, v in config.items() if k not in outer and k not in INERT and k != "text_config"}
    nested = config.get("text_config")
    if nested is None:
        return whole, flat
    faults = [
        f"{k} is {_short(v)} outside, {_short(nested[k])} in text_config"
        for k, v in flat.items()
        if nested.get(k) is not None and not _equal(v, nested[k])
    ]
    raise_all("the configuration contradicts its text_config", [f for f in faults if f.split()[0] not in _OWN])
    return whole | {k: v for k, v in flat.items() if k not in nested}, dict(nested)


def dtype_name(config: Mapping[str, Any]) -> str | None:
    """Returns the dtype of the weights, by the new name or the old, or None.

    >>> dtype_name({"torch_dtype": "torch.bfloat16"}), dtype_name({"dtype": "float16"}), dtype_name({})
    ('bfloat16', 'float16', None)
    """
    for part in (config, config.get("text_config") or {}):
        name = part.get("dtype") or part.get("torch_dtype")
        if name is not None:
            return str(name).removeprefix("torch.")
    return None


def rope(config: Mapping[str, Any], *, theta: float, layer_type: str | None = None) -> Rope:
    """Returns the rotary positions of a text configuration, from ``rope_theta`` and ``rope_scaling`` or ``rope_parameters``.

    ``theta`` is the architecture's default. ``layer_type`` ("full_attention", "sliding_attention") picks one where the layers
    differ (Gemma-3): in old files, sliding layers have ``rope_local_base_freq`` (else ``theta``) and no scaling.

    >>> rope({"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_theta": 1e6}, theta=1e4).factor
    8.0

    Raises:
      NotImplementedError: for a kind of scaling that is not known, by its name.
      ValueError: listing parameters that the kind does not have, or lacks.
    """
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if new is not None and layer_type is not None and any(isinstance(part, Mapping) for part in new.values()):
        return _rope(new.get(layer_type) or {}, config, theta)
    if new is not None:
        return _rope(new, config, theta)
    if layer_type == "sliding_attention":
        local = config.get("rope_local_base_freq")
        return Rope(theta=theta if local is None else float(local))
    return _rope(old or {}, config, theta)


def _rope(given: Mapping[str, Any], config: Mapping[str, Any], theta: float) -> Rope:
    kind = given.get("rope_type") or given.get("type") or "default"
    # "mrope" says how positions are laid out, not how frequencies are scaled.
    kind = "default" if kind == "mrope" else kind
    if kind not in _ROPE_KEYS:
        raise NotImplementedError(f"rope type {kind!r} is not implemented; known are {', '.join(_ROPE_KEYS)}")
    values = {k: v for k, v in given.items() if v is not None}
    faults = [
        f"{k} = {_short(v)} is not a parameter of {kind!r}{nearest(k, _ROPE_KEYS[kind])}"
        for k, v in values.items()
        if k not in _ROPE_KEYS[kind] | _ROPE_ALWAYS
    ]
    needed = {"linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",), "llama3": tuple(sorted(_ROPE_KEYS["llama3"]))}
    faults += [f"{k} is missing" for k in needed.get(kind, ()) if k not in values]
    texts = ("type", "rope_type", "mrope_section")
    faults += [f"{k} = {_short(v)} is not a number" for k, v in values.items() if k not in texts and not isinstance(v, int | float)]
    raise_all(f"rotary positions of type {kind!r} have wrong parameters", faults)
    base = values.pop("rope_theta", config.get("rope_theta"))
    original = values.pop("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    # transformers stretches "dynamic" from the model's own limit, whatever the file says of another.
    trained = config.get("max_position_embeddings") if kind == "dynamic" else original or config.get("max_position_embeddings")
    scaled = kind in ("dynamic", "llama3", "yarn")
    if scaled and trained is None:
        raise ValueError(f"rotary positions of type {kind!r} start from max_position_embeddings, which the file lacks")
    section = values.pop("mrope_section", None)
    partial = values.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    numbers: dict[str, Any] = {k: v if isinstance(v, bool) else float(v) for k, v in values.items() if k not in texts}
    return Rope(
        theta=float(theta if base is None else base),
        kind=kind,
        original_max_positions=trained if scaled else None,
        mrope_section=None if section is None else tuple(section),
        partial_rotary_factor=1.0 if partial is None else float(partial),
        **numbers,
    )


def _equal(a: object, b: object) -> bool:
    """1 is not True here, though 0 is 0.0."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
