"""Adapters: attach them at selected paths, say what is trained, and take the trees apart for the step."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conversion.peft_config import AdapterConfig, compress
from conversion.peft_format import read_adapter
from conversion.rules import Rules
from jaxlora.errors import nearest, raise_all
from jaxlora.nn.linear import Linear
from jaxlora.nn.stack import edit_linears, flatten_leaves, fold_path, linear_paths, linears, nest
from jaxlora.select import Selection, expand, is_stacked
from jaxlora.typing import Array, Float
from jaxlora.weights.base import AbstractWeight, abstract
from jaxlora.weights.dense import Dense
from jaxlora.weights.lora import LoRA

INITS = (True, False, "gaussian")
_EMBEDDING = "embed_tokens.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """An adapter's numbers under PEFT's names. ``target_modules`` is what an export writes: a list of suffixes or a regex.

    ``rank_pattern`` and ``alpha_pattern`` give other values to modules whose path matches ``(.*\\.)?(key)$``, first key first.
    """

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    random_state: int = 3407
    target_modules: str | tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self):
        faults = []
        if type(self.r) is not int or self.r < 1:
            faults.append(f"r must be a positive int, got {self.r!r}")
        if type(self.use_rslora) is not bool:
            faults.append(f"use_rslora must be a bool, got {self.use_rslora!r}")
        if not 0 <= self.lora_dropout < 1:
            faults.append(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if self.init_lora_weights not in INITS:
            hint = nearest(str(self.init_lora_weights), ["gaussian"])
            faults.append(f"init_lora_weights must be one of {INITS}, got {self.init_lora_weights!r}{hint}")
        raise_all("the LoRA configuration is wrong", faults)

    def rank(self, path: str) -> int:
        """R of a module, after ``rank_pattern``."""
        return int(_patterned(self.rank_pattern, path, self.r))

    def alpha(self, path: str) -> float:
        """alpha of a module, after ``alpha_pattern``."""
        return float(_patterned(self.alpha_pattern, path, self.lora_alpha))

    def scale(self, path: str) -> float:
        """s = alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).

        >>> LoRAConfig(r=16, lora_alpha=32).scale("q_proj"), LoRAConfig(r=16, lora_alpha=32, use_rslora=True).scale("q_proj")
        (2.0, 8.0)
        """
        r = self.rank(path)
        return self.alpha(path) / (math.sqrt(r) if self.use_rslora else r)


def attach(model: nnx.Module, selection: Selection, config: LoRAConfig) -> None:
    """Puts a LoRA pair into every selected Linear, with fresh values; the model's output does not change (B = 0).

    A ~ U(±1/sqrt(in)) (PEFT's Kaiming-uniform with a = sqrt(5)), or N(0, 1/r²) for "gaussian"; B = 0, or as A where
    ``init_lora_weights`` is False. A draw is keyed by ``random_state`` and the Linear's path alone.

    Raises:
      ValueError: the model has adapters already; a selected Linear is also in ``modules_to_save``, so that it would be trained whole.
    """
    names = config.modules_to_save
    both = [path for path in selection.paths if any(f".{path}".endswith(f".{name}") for name in names)]
    raise_all(f"these Linears are selected for an adapter, and trained whole by modules_to_save={list(names)}", both)
    _add_slots(model, set(selection.paths), config)
    key = jax.random.key(config.random_state)

    def fill(path: str, leaf: str) -> np.ndarray | Array:
        linear = linears_of[path]
        rank = config.rank(path)
        if leaf == "lora_scale":
            return jnp.float32(config.scale(path))
        draw = fold_path(key, f"{path}.{leaf}")
        if leaf == "lora_A":
            return _draw_a(draw, (rank, linear.features[1]), config.init_lora_weights)
        return (
            jnp.zeros((linear.features[0], rank)) if config.init_lora_weights is not False else _kaiming(draw, (linear.features[0], rank))
        )

    linears_of = {path: linear for stacked, linear in linears(model).items() for path in expand(stacked)}
    fill_adapters(model, fill)


def attach_from(model: Any, folder: str | os.PathLike, rules: Rules) -> LoRAConfig:
    """Attaches a PEFT adapter with exactly its ranks, scales and values; returns what ``partition`` and an export need to go on with it.

    ``rules`` is the architecture's rename table: the adapter may use any spelling that its checkpoints use. ``modules_to_save`` replace the
    base's tensors; a head that is saved, or whose embedding is, gets its own weight first. Everything is checked before the model changes.

    Raises:
      ValueError: listing every tensor that fits no Linear or has another shape, every Linear that the adapter's configuration declares
        and its file lacks, every ``modules_to_save`` tensor without its place; or as ``conversion.peft_format.read_adapter``.
      NotImplementedError: adapted embeddings, ``modules_to_save`` of some layers only, or what goes beyond plain LoRA.
    """
    stored = read_adapter(folder)
    embeddings = [path for path, pair in stored.tensors.items() if "lora_A" not in pair]
    raise_all("adapters of embeddings cannot be attached", embeddings, kind=NotImplementedError)
    leaves, targets = _leaves(model), {path: linear for stacked, linear in linears(model).items() for path in expand(stacked)}
    wanted = {*leaves, *(f"{path}.weight" for path in targets)}
    spelling = rules.detect([*(f"{module}.weight" for module in stored.tensors), *stored.modules_to_save], wanted)
    disk = {path: _module(spelling.to_disk(f"{path}.weight")) for path in targets}
    pairs = {_module(spelling.to_path(f"{module}.weight")): pair for module, pair in stored.tensors.items()}
    saved = {spelling.to_path(name): array for name, array in stored.modules_to_save.items()}
    trained = {path for path in wanted if stored.config.saves(_module(spelling.to_disk(path)))}
    faults = _pair_faults(pairs, targets, disk, stored.config)
    raise_all(f"the adapter {folder} does not fit the model", faults + _saved_faults(saved, trained, leaves))
    # PEFT writes the frozen weight of an adapted head beside its pair.
    saved = {path: array for path, array in saved.items() if path in trained or not _equals(model, leaves[path], array)}
    config = _translated(stored.config, disk, list(pairs), _names_of(trained, leaves))
    _add_slots(model, set(pairs), config)
    if any(leaves[path].tied for path in saved):
        untie(model)
    fill_adapters(model, lambda path, leaf: config.scale(path) if leaf == "lora_scale" else pairs[path][leaf])
    _replace(model, saved)
    return config


def fill_adapters(model: nnx.Module, value: Callable[[str, str], Any]) -> None:
    """Fills every adapter slot with ``value(path of the Linear, "lora_A" | "lora_B" | "lora_scale")``, stacked as the model is."""
    for stacked, linear in linears(model).items():
        if linear.lora is None:
            continue
        paths = expand(stacked)
        for leaf in ("lora_A", "lora_B", "lora_scale"):
            values = [jnp.asarray(value(path, leaf), jnp.float32) for path in paths]
            getattr(linear, leaf).set_value(values[0] if paths == [stacked] else jnp.stack(values))


def partition(model: nnx.Module, modules_to_save: Iterable[str] = (), *, full: bool = False) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Splits a model once into (graphdef, trainable, frozen), plain nested dicts.

    Trainable are the LoRA pairs and the leaves of ``modules_to_save`` (path suffixes), or with ``full`` every floating-point leaf.

    Raises:
      ValueError: a trainable leaf is packed (it has no gradient); a name of ``modules_to_save`` matches nothing, or a tied embedding.
    """
    names = tuple(modules_to_save)
    graphdef, state = nnx.split(model)
    leaves = flatten_leaves(nnx.to_pure_dict(state))

    def saved(path: str) -> bool:
        return any(f".{path.rpartition('.')[0]}".endswith(f".{name}") for name in names)

    trained = {path for path in leaves if path.endswith(("lora_A", "lora_B")) or saved(path) or (full and not path.endswith("lora_scale"))}
    faults = [f"{n!r} names no module" for n in names if not any(f".{p.rpartition('.')[0]}".endswith(f".{n}") for p in leaves)]
    packed = {p for p in trained if isinstance(leaves[p], AbstractWeight) and not leaves[p].trainable}
    faults += [f"{path} is packed as {type(leaves[path]).__name__}: load it in 16 bits to train it" for path in sorted(packed)]
    heads = [path for path, linear in linears(model).items() if linear.weight is None]
    shared = [p for p in trained if p.endswith(_EMBEDDING)] if heads and not full else []
    faults += [f"{path} is {heads[0]} as well (tied): call untie(model) first, since PEFT trains one of them alone" for path in shared]
    raise_all("these cannot be trained", faults)
    return (
        graphdef,
        nest({p: leaf for p, leaf in leaves.items() if p in trained}),
        nest({p: leaf for p, leaf in leaves.items() if p not in trained}),
    )


def untie(model: Any) -> None:
    """Gives a tied head a copy of the embedding's table as its own weight."""
    if model.lm_head.weight is None:
        model.lm_head.weight = nnx.data(nnx.Param(Dense(jnp.array(model.embed_table().array))))


def adapter_tensors(trainable: Mapping[str, Any]) -> dict[str, Float[Array, "..."]]:
    """The LoRA leaves of a trainable tree by path, layers apart: ``{"…q_proj.lora_A": [R, I]}``."""
    tensors = {}
    for stacked, leaf in flatten_leaves(trainable).items():
        if stacked.endswith(("lora_A", "lora_B")):
            paths = expand(stacked)
            tensors.update({path: leaf if paths == [stacked] else leaf[i] for i, path in enumerate(paths)})
    return tensors


def select_from(model: nnx.Module, select: Callable[[list[str]], Selection]) -> Selection:
    """Applies a selector to the model's Linear paths."""
    return select(linear_paths(model))


def _add_slots(model: nnx.Module, chosen: set[str], config: LoRAConfig) -> None:
    """Gives every chosen Linear an adapter of abstract leaves."""
    if any(linear.lora is not None for linear in linears(model).values()):
        raise ValueError("this model has LoRA adapters already; load it again to attach others")

    def slot(path: str, linear: Linear) -> None:
        if path in chosen:
            out, features = linear.features
            shapes = ((config.rank(path), features), (out, config.rank(path)), ())
            linear.attach(LoRA(*(abstract(shape, jnp.float32) for shape in shapes)), dropout=config.lora_dropout)

    edit_linears(model, slot)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A tensor of a model: the (stacked) path of its leaf, its own shape; whether it is packed, or shared by embedding and head."""

    stacked: str
    shape: tuple[int, ...]
    packed: bool
    tied: bool


def _leaves(model: Any) -> dict[str, _Leaf]:
    """Every tensor but adapters by path; a tied head has the embedding's shape."""
    found = {}
    heads = [path for path, linear in linears(model).items() if linear.weight is None]
    for stacked, leaf in flatten_leaves(nnx.to_pure_dict(nnx.state(model))).items():
        packed, paths = isinstance(leaf, AbstractWeight) and not leaf.trainable, expand(stacked)
        shape = leaf.shape if isinstance(leaf, AbstractWeight) else leaf.shape[1 if is_stacked(stacked) else 0 :]
        tied = bool(heads) and stacked.endswith(_EMBEDDING)
        if not stacked.rpartition(".")[2].startswith("lora_"):
            found.update({path: _Leaf(stacked, tuple(shape), packed, tied) for path in paths})
    found.update({f"{head}.weight": _Leaf(f"{head}.weight", model.embed_table().shape, False, True) for head in heads})
    return found


def _pair_faults(
    pairs: Mapping[str, Mapping[str, np.ndarray]], targets: Mapping[str, Linear], disk: Mapping[str, str], config: AdapterConfig
) -> list[str]:
    faults = []
    for path, pair in pairs.items():
        if path not in targets:
            faults.append(f"{path}: the model has no such Linear{nearest(path, targets)}")
            continue
        out, features = targets[path].features
        got = (pair["lora_B"].shape[0], pair["lora_A"].shape[1])
        if got != (out, features):
            faults.append(f"{path}: it adapts a Linear [out, in] of {list(got)}, the model's is {[out, features]}; is it for another size?")
    everything = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    declared = {path for path in targets if config.targets(disk[path]) and not (everything and path.endswith("lm_head"))}
    faults += [
        f"{path}: declared by target_modules, but the file has no tensors for it" for path in targets if path in declared - set(pairs)
    ]
    faults += [f"{path}: in the file, but target_modules does not declare it" for path in pairs if path in set(targets) - declared]
    return faults


def _saved_faults(saved: Mapping[str, np.ndarray], trained: set[str], leaves: Mapping[str, _Leaf]) -> list[str]:
    faults = [f"{path}: the model has no such tensor{nearest(path, leaves)}" for path in saved if path not in leaves]
    faults += [f"{path}: declared by modules_to_save, but not in the file" for path in sorted(trained - set(saved))]
    for path, array in saved.items():
        leaf = leaves.get(path)
        if leaf is not None and array.shape != leaf.shape:
            faults.append(f"{path}: its shape is {list(array.shape)}, the model's {list(leaf.shape)}; was the vocabulary resized?")
        elif leaf is not None and leaf.packed:
            faults.append(f"{path}: the model holds it packed in 4 bits: load it in 16 bits to train it whole")
    for stacked in {leaves[path].stacked for path in saved if path in leaves}:
        missing = [path for path in expand(stacked) if path not in saved]
        faults += [
            f"{path}: not saved, though other layers' are; layers are trained whole together" for path in missing if path not in trained
        ]
    return faults


def _translated(config: AdapterConfig, disk: Mapping[str, str], adapted: Sequence[str], names: tuple[str, ...]) -> LoRAConfig:
    """The configuration for the model's own paths; another spelling's patterns are written out for each path."""
    same = all(path == name for path, name in disk.items())
    (r, ranks), (alpha, alphas) = (config.r, config.rank_pattern), (config.lora_alpha, config.alpha_pattern)
    if not same and adapted:
        r, ranks = compress({path: config.rank(disk[path]) for path in adapted})
        alpha, alphas = compress({path: config.alpha(disk[path]) for path in adapted})
    return LoRAConfig(
        r=r,
        lora_alpha=float(alpha),
        lora_dropout=float(config.lora_dropout),
        use_rslora=config.use_rslora,
        target_modules=config.target_modules if same else None,
        rank_pattern=dict(ranks),
        alpha_pattern={key: float(value) for key, value in alphas.items()},
        modules_to_save=names,
    )


def _names_of(trained: set[str], leaves: Mapping[str, _Leaf]) -> tuple[str, ...]:
    """Names by which ``partition`` finds exactly these tensors' modules: the last one, or the whole path where that is too much."""
    names = set()
    for path in trained:
        module = _module(path)
        last = module.rpartition(".")[2]
        exact = all(other in trained for other in leaves if f".{_module(other)}".endswith(f".{last}"))
        names.add(last if exact else module)
    return tuple(sorted(names))


def _equals(model: Any, leaf: _Leaf, array: np.ndarray) -> bool:
    """Whether a tensor that is not stacked already holds these values."""
    flat = flatten_leaves(nnx.to_pure_dict(nnx.state(model)))
    (held,) = jax.tree.leaves(flat[leaf.stacked]) if leaf.stacked in flat else [model.embed_table().array]
    return held.shape == array.shape and bool(jnp.array_equal(held, jnp.asarray(array).astype(held.dtype)))


def _replace(model: nnx.Module, saved: Mapping[str, np.ndarray]) -> None:
    """Puts whole tensors in place, in the dtype of the leaves."""
    changed = {}
    for stacked, leaf in flatten_leaves(nnx.to_pure_dict(nnx.state(model))).items():
        paths = expand(stacked)
        if paths[0] in saved:
            (held,), treedef = jax.tree.flatten(leaf)
            arrays = [jnp.asarray(saved[path]).astype(held.dtype) for path in paths]
            changed[stacked] = jax.tree.unflatten(treedef, [jnp.stack(arrays) if is_stacked(stacked) else arrays[0]])
    nnx.update(model, nest(changed))


def _module(tensor_path: str) -> str:
    return tensor_path.rpartition(".")[0]


def _patterned(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _draw_a(key: Any, shape: tuple[int, int], init: bool | str) -> Array:
    return jax.random.normal(key, shape) / shape[0] if init == "gaussian" else _kaiming(key, shape)


def _kaiming(key: Any, shape: tuple[int, int]) -> Array:
    bound = 1 / math.sqrt(shape[1])
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
