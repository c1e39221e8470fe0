"""PEFT's LoRA adapter folders: adapter_config.json and adapter_model.safetensors, read without trust and written whole.

Keys are ``base_model.model.`` + module path + ``.lora_A.weight`` ([r, in]) or ``.lora_B.weight`` ([out, r]).
"""

import dataclasses
import json
import os
import pathlib
import warnings
from collections.abc import Iterable, Mapping

import numpy as np

from conversion._faults import describe, nearest, raise_all
from conversion.atomic import files_into
from conversion.peft_config import AdapterConfig, config_from_json
from conversion.rules import PEFT_PREFIX
from conversion.safetensors_io import DTYPES, CheckpointError, open_single, parse_json
from conversion.safetensors_write import write_safetensors

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = f"{PEFT_PREFIX}."
_MAX_CONFIG_BYTES = 10_000_000
_ENDINGS = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight"} | {n: f".{n}" for n in ("lora_embedding_A", "lora_embedding_B")}
_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
_UNSUPPORTED = {
    ".lora_magnitude_vector": "DoRA",
    ".lora_B.bias": "lora_bias",
    ".trainable_tokens_delta": "trainable_token_indices",
    ".base_layer.bias": "a trained bias",
    ".base_layer.lora_A.weight": "target_parameters",
    ".base_layer.lora_B.weight": "target_parameters",
}
_FLOATS = tuple(DTYPES[name] for name in ("F32", "BF16", "F16"))


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: ``tensors[module path]`` is {"lora_A": [r, in], "lora_B": [out, r]}, or {"lora_embedding_A": [r, V],
    "lora_embedding_B": [dim, r]}; ``modules_to_save[tensor path]`` replaces that tensor of the base model.
    """

    config: AdapterConfig
    tensors: Mapping[str, Mapping[str, np.ndarray]]
    modules_to_save: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def read_adapter(folder: str | os.PathLike) -> Adapter:
    """Reads an adapter folder; paths are those of the file, without ``base_model.model.``, in whatever spelling it has.

    Every tensor is accounted for. Adapters saved with the embedding (``….base_layer.weight``) give it in ``modules_to_save``.

    Raises:
      CheckpointError: if a file is missing, malformed, or is a pickle, which is never opened.
      NotImplementedError: listing what goes beyond plain LoRA (DoRA, LoRA biases, expert parameters, …).
      ValueError: listing every module whose pair is incomplete, misshapen, of another rank than the configuration says, or
        not finite, and every tensor that belongs to nothing.
    """
    root = pathlib.Path(folder)
    config = read_config(root)
    if not os.path.lexists(root / WEIGHTS_NAME):
        pickled = (root / "adapter_model.bin").exists()
        hint = (
            "; adapter_model.bin is a pickle and is never opened: load it with peft where you trust it, and save it again"
            if pickled
            else ""
        )
        raise CheckpointError(f"{root} has no {WEIGHTS_NAME}{hint}")
    weights = open_single(root, WEIGHTS_NAME)
    tensors: dict[str, dict[str, np.ndarray]] = {}
    saved: dict[str, np.ndarray] = {}
    strays = []
    _refuse_unsupported(weights.names())
    for name in weights.names():
        path = name.removeprefix(_PREFIX)
        part = next((p for p, ending in _ENDINGS.items() if path.endswith(ending)), None)
        if part is not None:
            tensors.setdefault(path.removesuffix(_ENDINGS[part]), {})[part] = weights.read(name)
        elif path.endswith(".base_layer.weight"):
            saved[f"{path.removesuffix('.base_layer.weight')}.weight"] = weights.read(name)
        elif config.saves(path.rpartition(".")[0]):
            saved[path] = weights.read(name)
        else:
            strays.append(name)
    names = [*config.modules_to_save, *(config.target_modules if isinstance(config.target_modules, tuple) else ())]
    known = f"the file holds {len(weights.names())} tensors, of {len(tensors)} adapted modules"
    faults = describe(strays, lambda n: f"{n!r} is neither of a LoRA pair nor of modules_to_save{nearest(n.split('.')[-2:][0], names)}")
    raise_all(f"{len(strays)} tensors of {root / WEIGHTS_NAME} belong to nothing; {known}", faults)
    adapter = Adapter(config, tensors, saved)
    check(adapter)
    unused = config.unused_patterns(tensors)
    if unused:
        warnings.warn(
            f"{len(unused)} patterns of {root / CONFIG_NAME} match none of {len(tensors)} adapted modules: {unused}", stacklevel=2
        )
    return adapter


def read_config(folder: str | os.PathLike) -> AdapterConfig:
    """Reads adapter_config.json alone; raises as ``read_adapter``."""
    path = pathlib.Path(folder) / CONFIG_NAME
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"it is larger than {_MAX_CONFIG_BYTES} bytes")
        fields = parse_json(path.read_bytes().lstrip())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a valid adapter configuration: {error}") from error
    return config_from_json(fields)


def write_adapter(folder: str | os.PathLike, adapter: Adapter) -> None:
    """Writes an adapter that PEFT loads without a warning; other files of the folder stay, as does an existing README.md.

    Dtypes are kept. ``read_adapter`` gives the same adapter back, bit for bit.

    Raises:
      ValueError: as ``read_adapter``, before anything is written.
    """
    check(adapter)
    tensors = {f"{_PREFIX}{path}{_ENDINGS[part]}": t for path, pair in adapter.tensors.items() for part, t in pair.items()}
    for path, tensor in adapter.modules_to_save.items():
        module, _, leaf = path.rpartition(".")
        # PEFT finds the weight of a module that it also adapts one level down.
        tensors[f"{_PREFIX}{module}.base_layer.{leaf}" if module in adapter.tensors else f"{_PREFIX}{path}"] = tensor
    with files_into(folder, last=CONFIG_NAME) as temporary:
        write_safetensors(temporary / WEIGHTS_NAME, tensors, require_finite=True, require_nonempty=True)
        (temporary / CONFIG_NAME).write_text(json.dumps(adapter.config.to_json(), indent=2, sort_keys=True), "utf-8")
        if not (pathlib.Path(folder) / "README.md").exists():
            (temporary / "README.md").write_text(_model_card(adapter), "utf-8")


def check(adapter: Adapter) -> None:
    """Raises one ValueError that lists every broken module of an adapter, or an adapter without any tensor."""
    if not adapter.tensors and not adapter.modules_to_save:
        raise ValueError("the adapter is empty: it has neither a LoRA pair nor modules_to_save")
    broken = {path: fault for path, pair in adapter.tensors.items() if (fault := _pair_fault(adapter.config, path, pair))}
    for path, tensor in adapter.modules_to_save.items():
        module = path.rpartition(".")[0]
        if not adapter.config.saves(module) and module not in adapter.tensors:
            names = adapter.config.modules_to_save
            broken[path] = f"not under any name of modules_to_save {list(names)}{nearest(module.rpartition('.')[2], names)}"
        elif fault := _values_fault(path, tensor):
            broken[path] = fault
    total = len(adapter.tensors) + len(adapter.modules_to_save)
    raise_all(f"{len(broken)} of the adapter's {total} modules are broken", describe(list(broken), lambda p: f"{p}: {broken[p]}"))


def _pair_fault(config: AdapterConfig, path: str, pair: Mapping[str, np.ndarray]) -> str:
    if tuple(sorted(pair)) not in _PAIRS:
        return f"it has {sorted(pair)}; expected lora_A and lora_B"
    (a_name, a), (b_name, b) = sorted(pair.items())
    if a.ndim != 2 or b.ndim != 2:
        return (
            f"{a_name} is {list(a.shape)} and {b_name} {list(b.shape)}; only Linears and embeddings, [r, in] and [out, r], can be adapted"
        )
    rank = config.rank(path)
    if a.shape[0] != rank or b.shape[1] != rank:
        swapped = "; were they swapped?" if a.shape[1] == rank == b.shape[0] else ""
        return f"its rank is {rank} by the configuration, but {a_name} is {list(a.shape)} and {b_name} {list(b.shape)}{swapped}"
    return _values_fault(a_name, a) or _values_fault(b_name, b)


def _values_fault(name: str, tensor: np.ndarray) -> str:
    if tensor.dtype not in _FLOATS:
        return f"{name} is {tensor.dtype}; expected one of {', '.join(str(d) for d in _FLOATS)}"
    if tensor.size == 0:
        return f"{name} has no elements: {list(tensor.shape)}"
    bad = int(tensor.size - np.isfinite(tensor).sum())
    return f"{name} has {bad} of {tensor.size} values that are not finite; did training diverge?" if bad else ""


def _refuse_unsupported(names: Iterable[str]) -> None:
    counts: dict[str, list[str]] = {}
    for name in names:
        for ending, feature in _UNSUPPORTED.items():
            if name.endswith(ending):
                counts.setdefault(feature, []).append(name)
    faults = [f"{feature}: {len(found)} tensors, the first {found[0]!r}" for feature, found in counts.items()]
    raise_all("the adapter goes beyond plain LoRA", faults, kind=NotImplementedError)


def _model_card(adapter: Adapter) -> str:
    base, config = adapter.config.base_model_name_or_path or "", adapter.config
    # The hub checks this field; a local path would be refused.
    is_hub_id = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    front = ["library_name: peft", "tags:", "- lora", *([f"base_model: {base}"] if is_hub_id else [])]
    count = sum(t.size for pair in adapter.tensors.values() for t in pair.values())
    lines = [
        "# LoRA adapter",
        "",
        f"Base model: {f'`{base}`' if base else 'not recorded'}. {len(adapter.tensors)} modules are adapted ({count:,} parameters), "
        f"rank {config.r}, alpha {config.lora_alpha:g}{', rank-stabilised' if config.use_rslora else ''}.",
        "",
        "Load it with `peft.PeftModel.from_pretrained(base_model, folder)` or with jaxlora.",
    ]
    return "\n".join(["---", *front, "---", "", *lines, ""])
