"""PEFT's adapter_config.json: which modules a LoRA adapter covers, with which rank and scale. Meanings are those of peft 0.21."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from conversion._faults import raise_all

# Say nothing about what the tensors mean; eva_config only steered the start, whose ranks are in rank_pattern.
_INERT = (
    "auto_mapping",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
)
# Those that leave the base model as it is; the others (pissa, olora, loftq, corda, lora_ga, …) subtract from it.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What of a LoRA adapter's configuration changes its meaning. Patterns are regexes, matched as ``(.*\\.)?(KEY)$``, first wins.

    ``target_modules`` is a list of whole paths or last segments, or one regex that matches whole paths.

    >>> config = AdapterConfig(r=8, lora_alpha=16, target_modules=("q_proj",), rank_pattern={"layers.0.*q_proj": 4})
    >>> [(config.rank(path), config.scale(path)) for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")]
    [(4, 4.0), (8, 2.0)]

    Raises:
      ValueError: listing every field that is out of range.
    """

    r: int
    lora_alpha: int | float
    target_modules: tuple[str, ...] | str
    lora_dropout: int | float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None

    def __post_init__(self):
        faults = [f"{k} is {v}, but a rank is at least 1" for k, v in {"r": self.r, **self.rank_pattern}.items() if v < 1]
        alphas = {"lora_alpha": self.lora_alpha, **self.alpha_pattern}
        faults += [f"{k} is {v}, but alpha is finite" for k, v in alphas.items() if not math.isfinite(v)]
        if not 0 <= self.lora_dropout < 1:
            faults.append(f"lora_dropout is {self.lora_dropout}, but a probability below 1 is expected")
        whole = [v for v in (self.target_modules, self.exclude_modules) if isinstance(v, str)]
        for pattern in (*self.rank_pattern, *self.alpha_pattern, *self.modules_to_save, *self.layers_pattern, *whole):
            try:
                re.compile(pattern)
            except re.error as error:
                faults.append(f"{pattern!r} is not a regex: {error}")
        raise_all("the adapter's configuration is wrong", faults)

    def rank(self, path: str) -> int:
        """Returns the rank of the module at ``path``, after ``rank_pattern``."""
        key = pattern_key(self.rank_pattern, path)
        return self.r if key is None else self.rank_pattern[key]

    def alpha(self, path: str) -> int | float:
        """Returns alpha of the module at ``path``, after ``alpha_pattern``."""
        key = pattern_key(self.alpha_pattern, path)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def scale(self, path: str) -> float:
        """Returns s of y = W x + s B A x: alpha / r, or alpha / sqrt(r) with ``use_rslora``."""
        rank = self.rank(path)
        return self.alpha(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, path: str) -> bool:
        """Returns whether PEFT would adapt the Linear at ``path``; exclusions and ``modules_to_save`` win over targets.

        "all-linear" is true of every path: the caller asks about Linears only, and not about the output head.
        """
        saved = any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save)
        if saved or _matches(self.exclude_modules, path):
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return True
        if not _matches(self.target_modules, path):
            return False
        # As in PEFT, a whole path in the list, and a regex, are not subject to the layer filter.
        if not self.layers_to_transform or isinstance(self.target_modules, str) or path in self.target_modules:
            return True
        return layer_index(path, self.layers_pattern) in self.layers_to_transform

    def saves(self, path: str) -> bool:
        """Returns whether PEFT trains the module at ``path`` whole: it, or a module that it is in, ends with a name of
        ``modules_to_save``; not only at a dot, so that "norm" saves ``input_layernorm`` too.
        """
        parts = path.split(".")
        modules = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        return any(module.endswith(name) for module in modules for name in self.modules_to_save)

    def unused_patterns(self, paths: Collection[str]) -> list[str]:
        """Returns the keys of ``rank_pattern`` and ``alpha_pattern`` that decide nothing about any of the paths."""
        unused = []
        for keys in (self.rank_pattern, self.alpha_pattern):
            used = {pattern_key(keys, path) for path in paths}
            unused += [key for key in keys if key not in used]
        return unused

    def to_json(self) -> dict[str, Any]:
        """Returns the fields of adapter_config.json that every peft knows, and of the newer ones those in use: old ones refuse them."""
        fields = dataclasses.asdict(self)
        lists = ("modules_to_save", "layers_to_transform", "layers_pattern")
        fields |= {name: list(fields[name]) if fields[name] else None for name in lists}
        fields |= {name: list(v) for name in ("target_modules", "exclude_modules") if isinstance(v := fields[name], tuple)}
        fields |= {"lora_alpha": _whole(self.lora_alpha), "alpha_pattern": {k: _whole(v) for k, v in self.alpha_pattern.items()}}
        for newer in ("exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern"):
            if not fields[newer]:
                del fields[newer]
        fixed = {"bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "peft_type": "LORA"}
        return fields | fixed | {"auto_mapping": None}


def config_from_json(fields: Mapping[str, Any]) -> AdapterConfig:
    """Reads the fields of adapter_config.json; missing ones take peft's defaults.

    >>> config_from_json({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}).lora_alpha
    8

    Raises:
      NotImplementedError: listing every field that asks for something else than plain LoRA, and every unknown one whose
        value is not null, false, zero or empty.
      ValueError: listing every field of the wrong type.
    """
    known = {f.name for f in dataclasses.fields(AdapterConfig)}
    asked = {k: v for k, v in fields.items() if k not in known and k not in _INERT and v}
    asked.pop("bias", None) if asked.get("bias") == "none" else None
    start = fields.get("init_lora_weights", True)
    if any(start is plain or start == plain for plain in _PLAIN_STARTS):
        asked.pop("init_lora_weights", None)
    unknown = [f"{key} = {str(value)[:80]}" for key, value in sorted(asked.items())]
    if fields.get("peft_type", "LORA") != "LORA":
        unknown.append(f"peft_type = {str(fields['peft_type'])[:80]}")
    raise_all(f"the adapter's configuration asks for {len(unknown)} things besides plain LoRA", unknown, kind=NotImplementedError)
    given = {k: v for k, v in fields.items() if k in known and v is not None}
    given = {"r": 8, "lora_alpha": 8} | given
    faults = [f"{k} is {str(v)[:80]}; expected {_TYPES[k][1]}" for k, v in given.items() if not _TYPES[k][0](v)]
    if "target_modules" not in given:
        faults.append("target_modules is missing")
    raise_all("the adapter's configuration is wrong", faults)
    as_list = {k: (v,) if isinstance(v, str | int) else tuple(v) for k, v in given.items() if k in _LISTS}
    names = {k: tuple(v) for k, v in given.items() if k in ("target_modules", "exclude_modules") and isinstance(v, list)}
    checked: dict[str, Any] = given | as_list | names
    return AdapterConfig(**checked)


def compress[T](values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """Returns the commonest value and a pattern for the other modules, as ``r`` and ``rank_pattern`` or as alphas.

    >>> compress({"layers.0.q_proj": 8, "layers.1.q_proj": 4, "layers.2.q_proj": 8})
    (8, {'layers.1.q_proj': 4})

    Raises:
      ValueError: if no module is given, or a path, read as a regex, decides for another one.
    """
    if not values:
        raise ValueError("no module is adapted, so there is neither a rank nor an alpha")
    every = list(values.values())
    common = max(every, key=every.count)
    others = [path for path, value in values.items() if value != common]
    ended = [path for path, value in values.items() if value == common and any(path.endswith(f".{other}") for other in others)]
    # Longest first: a path that ends another one must not decide for it.
    pattern = {path: values[path] for path in sorted([*others, *ended], key=len, reverse=True)}
    wrong = [p for p, v in values.items() if (common if (key := pattern_key(pattern, p)) is None else pattern[key]) != v]
    raise_all("paths match each other as regexes, so that no pattern tells them apart", wrong)
    return common, pattern


def pattern_key(keys: Iterable[str], path: str) -> str | None:
    """Returns the first key that matches ``path`` from a dot, or its start, to its end: regex ``(.*\\.)?(KEY)$``.

    >>> pattern_key(["proj", "q_proj", ".*_proj"], "model.layers.0.q_proj")
    'q_proj'
    """
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), None)


def layer_index(path: str, patterns: Sequence[str] = ()) -> int | None:
    """Returns the first number that follows a module of one of the patterns, or without patterns any but the first module.

    >>> layer_index("model.layers.3.mlp.experts.7.w1"), layer_index("model.visual.blocks.1.attn.qkv", ["layers"])
    (3, None)
    """
    tries = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((m for m in (re.match(t, path) for t in tries) if m), None)
    return None if found is None else int(found[1])


def _matches(names: tuple[str, ...] | str, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _whole(value: int | float) -> int | float:
    """16.0 as 16: what peft writes, and what its annotation asks for."""
    return int(value) if float(value).is_integer() else value


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list_of(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(type(v) is kind for v in value)


def _map_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(fits(v) for v in value.values())


def _integer(value: object) -> bool:
    return type(value) is int


def _text(value: object) -> bool:
    return isinstance(value, str)


_LISTS = ("modules_to_save", "layers_to_transform", "layers_pattern")
_TYPES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "r": (_integer, "an integer"),
    "lora_alpha": (_number, "a number"),
    "target_modules": (lambda v: _text(v) or _list_of(str)(v), "a list of names or one regex"),
    "lora_dropout": (_number, "a number"),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "rank_pattern": (_map_of(_integer), "an object of integers"),
    "alpha_pattern": (_map_of(_number), "an object of numbers"),
    "modules_to_save": (_list_of(str), "a list of names"),
    "exclude_modules": (lambda v: _text(v) or _list_of(str)(v), "a list of names or one regex"),
    "layers_to_transform": (lambda v: _integer(v) or _list_of(int)(v), "an integer or a list of them"),
    "layers_pattern": (lambda v: _text(v) or _list_of(str)(v), "a name or a list of them"),
    "base_model_name_or_path": (_text, "text"),
    "revision": (_text, "text"),
    "task_type": (_text, "text"),
}
