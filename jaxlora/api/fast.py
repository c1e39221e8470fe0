"""The classes that scripts call: from_pretrained, get_peft_model, for_training, for_inference."""

import dataclasses
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from jaxlora import adapt, select
from jaxlora.api import folders
from jaxlora.api.model import Model, refuse_unavailable, refuse_unknown
from jaxlora.errors import nearest
from jaxlora.load import LoadConfig, Loaded, describe_formats, load, read_config
from jaxlora.nn.stack import linear_paths, linears
from jaxlora.select import Selection
from jaxlora.train.meters import shows_bars

log = logging.getLogger(__name__)

LANGUAGE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Arguments of Unsloth's from_pretrained that only torch, bitsandbytes or vLLM give a meaning to.
IGNORED_LOADING = (
    "device_map fix_tokenizer use_exact_model_name offload_embedding float32_mixed_precision gpu_memory_utilization float8_kv_cache "
    "random_state max_lora_rank disable_log_stats unsloth_tiled_mlp return_logits fullgraph auto_model unsloth_force_compile "
    "attn_implementation load_in_16bit text_only low_cpu_mem_usage torch_dtype"
).split()
# … and what would change the result, so that ignoring it would lie. The values listed ask for nothing.
UNAVAILABLE_LOADING: Mapping[str, tuple[Any, ...]] = {
    "load_in_8bit": (False, None),
    "load_in_fp8": (False, None),
    "rope_scaling": (None,),
    "resize_model_vocab": (None,),
    "fast_inference": (False, None),
    "qat_scheme": (None,),
}
IGNORED_ADAPTING = "max_seq_length temporary_location task_type ensure_weight_tying finetune_audio_layers loftq_config".split()
UNAVAILABLE_ADAPTING: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "qat_scheme": (None,),
    "target_parameters": (None, [], ()),
    "layer_replication": (None,),
    "exclude_modules": (None, [], ()),
}


class FastModel:
    """Any architecture: ``from_pretrained`` and ``get_peft_model`` with the vision/language/attention/MLP switches."""

    @staticmethod
    def from_pretrained(
        model_name: str = "",
        max_seq_length: int | None = 2048,
        dtype: Any = None,
        load_in_4bit: bool = True,
        *,
        full_finetuning: bool = False,
        quant_type: str = "int4",
        compute_dtype: str | None = None,
        quantization_config: Any = None,
        token: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        **arguments: Any,
    ) -> tuple[Model, Any]:
        """Loads (model, processor or tokenizer) from a hub id, a local folder, or an adapter's folder (its base, then the adapter).

        ``load_in_4bit`` quantises 16-bit weights while they load: ``quant_type`` "int4" (symmetric, groups of 64, searched scales) or
        "nf4" (bitsandbytes'); a bitsandbytes checkpoint stays what it is. ``compute_dtype`` "float8" multiplies the frozen weights in e4m3
        (sm89 and up): faster, with 2.6 % of noise on every operand; adapters stay in the activations' dtype. ``full_finetuning`` loads
        16-bit weights and trains them all.

        Raises:
          ValueError: no such folder; an incomplete or foreign checkpoint; ``trust_remote_code=True`` (repository code never runs).
          NotImplementedError: an architecture or an option that is not available.
          TypeError: an argument that nobody knows.
        """
        if trust_remote_code:
            raise ValueError("trust_remote_code=True: jaxlora never runs code from a model repository; its own models are used or none")
        refuse_unavailable("from_pretrained", arguments, UNAVAILABLE_LOADING)
        refuse_unknown("from_pretrained", arguments, IGNORED_LOADING, inspect.signature(FastModel.from_pretrained).parameters)
        quant_type = _quant_type(quantization_config, quant_type)
        _keep_compiled_programs()
        folder = folders.resolve(model_name, token=token, revision=revision)
        adapter = folder if folders.is_adapter(folder) else None
        base_name = folders.base_of(folder) if adapter else str(model_name)
        base = folders.resolve(base_name, token=token) if adapter else folder
        config = LoadConfig(
            load_in_4bit=(load_in_4bit or quantization_config is not None) and not full_finetuning,
            quant_type=quant_type,
            dtype=_dtype(dtype),
            compute_dtype=compute_dtype,
            max_seq_length=max_seq_length if not _has_vision(base) else None,
        )
        loaded = _load_with_progress(base, config)
        limit = _text(loaded).max_position_embeddings
        model = Model(loaded, adapt.partition(loaded.model, full=full_finetuning), name=base_name, max_seq_length=max_seq_length or limit)
        model.full_finetuning, model.use_gradient_checkpointing = full_finetuning, use_gradient_checkpointing
        if adapter:
            _attach_saved(model, adapter)
        processor = folders.processor_of([folder, base] if adapter else [folder], loaded.spec.model_type)
        return model, processor

    @staticmethod
    def get_peft_model(
        model: Model,
        r: int = 16,
        target_modules: str | Sequence[str] | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        *,
        finetune_last_n_layers: int | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        use_gradient_checkpointing: bool | str | None = None,
        random_state: int = 3407,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        **arguments: Any,
    ) -> Model:
        """Attaches LoRA to the Linears of the towers and kinds that are switched on; ``target_modules`` as in PEFT narrows them.

        ``use_gradient_checkpointing`` None keeps what from_pretrained was told.

        Raises:
          RuntimeError: the model has an adapter already.
          ValueError: a target that hits nothing, flags that select nothing, a wrong number.
          TypeError: an argument that nobody knows.
        """
        if model.full_finetuning:
            log.warning("full fine-tuning trains every weight: get_peft_model has no effect")
            return model
        _refuse_adapting(model, bias, arguments)
        targets, saved = _split_saved(target_modules, modules_to_save)
        config = adapt.LoRAConfig(
            r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora, init_lora_weights=init_lora_weights,
            random_state=random_state, rank_pattern=rank_pattern or {}, alpha_pattern=alpha_pattern or {}, modules_to_save=saved,
        )  # fmt: skip
        module = model.module()
        selection = select.by_flags(
            linear_paths(module), vision=finetune_vision_layers, language=finetune_language_layers,
            attention=finetune_attention_modules, mlp=finetune_mlp_modules, targets=targets,
        )  # fmt: skip
        layers = _layers(_text(model.loaded).num_hidden_layers, layers_to_transform, finetune_last_n_layers)
        selection = select.of_layers(selection, layers, layers_pattern)
        _attach(model, module, selection, config)
        if use_gradient_checkpointing is not None:
            model.use_gradient_checkpointing = use_gradient_checkpointing
        model.print_trainable_parameters()
        return model

    @staticmethod
    def for_training(model: Model, use_gradient_checkpointing: bool | str | None = None) -> Model:
        """Nothing has to change for training; a given ``use_gradient_checkpointing`` is remembered."""
        if use_gradient_checkpointing is not None:
            model.use_gradient_checkpointing = use_gradient_checkpointing
        return model

    @staticmethod
    def for_inference(model: Any) -> Model:
        """Nothing has to change for generation either: the same buffers serve both.

        Raises:
          TypeError: a tokenizer was given.
        """
        if not isinstance(model, Model):
            raise TypeError(f"for_inference takes the model, got {type(model).__name__}; was the tokenizer given?")
        return model


class FastVisionModel(FastModel):
    """Vision-language models (and text models): all four switches are on unless told otherwise."""


class FastLanguageModel:
    """Text models: the seven projections are adapted unless told otherwise."""

    from_pretrained = staticmethod(FastModel.from_pretrained)
    for_training = staticmethod(FastModel.for_training)
    for_inference = staticmethod(FastModel.for_inference)

    @staticmethod
    def get_peft_model(
        model: Model, r: int = 16, target_modules: str | Sequence[str] | None = LANGUAGE_TARGETS, lora_alpha: float = 16, **arguments: Any
    ) -> Model:
        """As FastModel's, with vision off; the same call on an adapted model changes nothing, another one is refused.

        Raises:
          TypeError: the model has an adapter of other settings.
        """
        arguments = {"finetune_vision_layers": False, "lora_alpha": lora_alpha, **arguments}
        if model.lora is None:
            return FastModel.get_peft_model(model, r, target_modules, **arguments)
        wanted = {"r": r, "target_modules": target_modules, **arguments}
        different = {k: (has, wanted[k]) for k, has in _settings(model).items() if k in wanted and not _same(has, wanted[k])}
        if different:
            raise TypeError(f"this model has an adapter of other settings (has, asked for): {different}; load it again to change them")
        log.warning("this model has these adapters already: get_peft_model has no effect")
        return model


def _refuse_adapting(model: Model, bias: str, arguments: dict[str, Any]) -> None:
    """What get_peft_model cannot do, with the reason."""
    if model.lora is not None:
        raise RuntimeError("this model has LoRA adapters already: call from_pretrained again to attach others")
    refuse_unavailable("get_peft_model", arguments, UNAVAILABLE_ADAPTING)
    refuse_unknown("get_peft_model", arguments, IGNORED_ADAPTING, inspect.signature(FastModel.get_peft_model).parameters)
    if bias != "none":
        raise NotImplementedError(f'bias={bias!r} is not available: only bias="none", frozen biases')


def _settings(model: Model) -> dict[str, Any]:
    """The settings of a model's adapter that a second call can be compared with."""
    lora = model.lora
    assert lora is not None
    names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "random_state")
    leaves = sorted({path.rpartition(".")[2] for path in model.selection.paths}) if model.selection else []
    return {**{name: getattr(lora, name) for name in names}, "target_modules": leaves}


def _same(has: Any, wanted: Any) -> bool:
    return sorted(wanted) == has if isinstance(has, list) and isinstance(wanted, list | tuple) else has == wanted


def _keep_compiled_programs() -> None:
    """Turns the persistent compilation cache on, unless the user chose a place (JAX_COMPILATION_CACHE_DIR) or there is no accelerator."""
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(folders.cache() / "xla"))


def _load_with_progress(folder: Any, config: LoadConfig) -> Loaded:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True, disable=not shows_bars()) as bar:
        task = bar.add_task("loading", total=None)

        def progress(_path: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        loaded = load(folder, config, progress=progress)
    print(f"jaxlora: {loaded.spec.architecture} from {folder} on {jax.devices()[0].device_kind}; {describe_formats(loaded)}")
    return loaded


def _attach(model: Model, module: nnx.Module, selection: Selection, config: adapt.LoRAConfig) -> None:
    if any(name.endswith("lm_head") for name in config.modules_to_save):
        adapt.untie(module)
    adapt.attach(module, selection, config)
    parts = adapt.partition(module, config.modules_to_save)
    model.lora, model.selection = config, selection
    model.replace(parts)


def _attach_saved(model: Model, folder: Any) -> None:
    module = model.module()
    config = adapt.attach_from(module, folder, model.loaded.spec.rules)
    adapted = [path for stacked, linear in linears(module).items() if linear.lora is not None for path in select.expand(stacked)]
    model.lora, model.selection = config, select.by_pattern(linear_paths(module), adapted)
    model.replace(adapt.partition(module, config.modules_to_save))


def _split_saved(targets: Any, modules_to_save: Sequence[str] | None) -> tuple[Any, tuple[str, ...]]:
    """``embed_tokens`` among the targets is trained whole, as Unsloth does."""
    saved = list(modules_to_save or ())
    if isinstance(targets, list | tuple | set):
        targets = list(targets)
        saved += [t for t in targets if t == "embed_tokens"]
        targets = [t for t in targets if t != "embed_tokens"]
    return targets, tuple(dict.fromkeys(saved))


def _layers(depth: int, layers: int | Sequence[int] | None, last: int | None) -> tuple[int, ...] | None:
    if last is not None:
        return tuple(range(depth - min(max(last, 1), depth), depth))
    return (layers,) if isinstance(layers, int) else None if layers is None else tuple(layers)


def _quant_type(quantization_config: Any, default: str) -> str:
    if quantization_config is None:
        return default
    given = quantization_config if isinstance(quantization_config, Mapping) else quantization_config.to_dict()
    if not given.get("load_in_4bit"):
        raise NotImplementedError(f"quantization_config must ask for load_in_4bit, got {dict(given)}")
    if given.get("bnb_4bit_quant_type", "nf4") != "nf4":
        raise NotImplementedError(
            f"bnb_4bit_quant_type={given['bnb_4bit_quant_type']!r} is not available for quantising on loading: only nf4"
        )
    return "nf4"


def _dtype(dtype: Any) -> Any:
    """A jax or numpy dtype, a name, or torch's dtype by its name."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    known = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
    if isinstance(dtype, str) or name in known:
        if name not in known:
            raise ValueError(f"dtype must be one of {sorted(known)}, got {dtype!r}{nearest(name, known)}")
        return jnp.dtype(known[name])
    return jnp.dtype(dtype)


def _has_vision(folder: Any) -> bool:
    return "vision_config" in read_config(folder)


def _text(loaded: Loaded) -> Any:
    """The decoder's config, also of a vision-language model."""
    config = loaded.config
    return config.text if "text" in {f.name for f in dataclasses.fields(config)} else config
