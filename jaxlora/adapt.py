"""Adapters: attach them at selected paths, say what is trained, and take the trees apart for the step."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlora.errors import nearest, raise_all
from jaxlora.nn.linear import Linear
from jaxlora.nn.stack import Stack, flatten_leaves, fold_path, linear_paths, linears, nest
from jaxlora.select import Selection, expand
from jaxlora.typing import Array, Float
from jaxlora.weights.base import AbstractWeight, abstract
from jaxlora.weights.dense import Dense
from jaxlora.weights.lora import LoRA

INITS = (True, False, "gaussian")


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
      ValueError: the model has adapters already.
    """
    if any(linear.lora is not None for linear in linears(model).values()):
        raise ValueError("this model has LoRA adapters already; load it again to attach others")
    chosen = set(selection.paths)

    def slot(path: str, linear: Linear) -> None:
        if path in chosen:
            out, features = linear.features
            shapes = ((config.rank(path), features), (out, config.rank(path)), ())
            linear.attach(LoRA(*(abstract(shape, jnp.float32) for shape in shapes)), dropout=config.lora_dropout)

    edit_linears(model, slot)
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


def fill_adapters(model: nnx.Module, value: Callable[[str, str], Any]) -> None:
    """Fills every adapter slot with ``value(path of the Linear, "lora_A" | "lora_B" | "lora_scale")``, stacked as the model is."""
    for stacked, linear in linears(model).items():
        if linear.lora is None:
            continue
        paths = expand(stacked)
        for leaf in ("lora_A", "lora_B", "lora_scale"):
            values = [jnp.asarray(value(path, leaf), jnp.float32) for path in paths]
            getattr(linear, leaf).set_value(values[0] if paths == [stacked] else jnp.stack(values))


def edit_linears(model: nnx.Module, edit: Callable[[str, Linear], None]) -> None:
    """Calls ``edit(path, linear)`` on every Linear, regrouping stacks by what it changed; new leaves stay abstract."""
    stacks = {".".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, Stack)}
    for path, stack in stacks.items():

        def edit_block(layer: int, block: nnx.Module, path: str = path) -> None:
            for inner, linear in linears(block).items():
                edit(f"{path}.{layer}.{inner}", linear)

        *parents, name = path.split(".")
        owner = model
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, stack.regroup(edit_block))
    for path, linear in linears(model).items():
        if not any(path.startswith(f"{stack}.") for stack in stacks):
            edit(path, linear)


def partition(model: nnx.Module, modules_to_save: Iterable[str] = (), *, full: bool = False) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Splits a model once into (graphdef, trainable, frozen), plain nested dicts.

    Trainable are the LoRA pairs and the leaves of ``modules_to_save`` (path suffixes), or with ``full`` every floating-point leaf.

    Raises:
      ValueError: a trainable leaf is packed (it has no gradient); a name of ``modules_to_save`` matches nothing.
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


def _patterned(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _draw_a(key: Any, shape: tuple[int, int], init: bool | str) -> Array:
    return jax.random.normal(key, shape) / shape[0] if init == "gaussian" else _kaiming(key, shape)


def _kaiming(key: Any, shape: tuple[int, int]) -> Array:
    bound = 1 / math.sqrt(shape[1])
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
