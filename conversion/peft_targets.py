"""What to write as target_modules and modules_to_save, so that PEFT selects exactly the modules that were trained."""

import re
from collections.abc import Collection, Iterable, Mapping

from conversion.peft_config import AdapterConfig


def containers(tensor_paths: Iterable[str]) -> set[str]:
    """Returns every module on the way to a tensor, since PEFT matches names against all modules, not only Linears.

    >>> sorted(containers(["model.layers.0.mlp.up_proj.weight"]))
    ['model', 'model.layers', 'model.layers.0', 'model.layers.0.mlp', 'model.layers.0.mlp.up_proj']
    """
    found: set[str] = set()
    for path in tensor_paths:
        module = path.rpartition(".")[0]
        while module and module not in found:
            found.add(module)
            module = module.rpartition(".")[0]
    return found


def target_modules(adapted: Collection[str], modules: Collection[str], given: str | tuple[str, ...] | None = None) -> str | tuple[str, ...]:
    """Returns ``given`` if PEFT selects exactly ``adapted`` with it, else the last names if these do, else a regex that does.

    >>> modules = ["layers.0.q_proj", "layers.1.q_proj", "layers.0.up_proj"]
    >>> target_modules(modules[:2], modules), target_modules(modules[:1], modules)
    (('q_proj',), 'layers\\\\.0\\\\.q_proj')
    """
    names = tuple(sorted({path.rpartition(".")[2] for path in adapted}))
    for candidate in (given, names):
        # "all-linear" depends on what the reader's version calls a Linear.
        if candidate and str(candidate).lower() != "all-linear" and selects(candidate, modules) == set(adapted):
            return candidate
    return full_match_regex(adapted)


def selects(targets: str | tuple[str, ...], modules: Iterable[str]) -> set[str]:
    """Returns the modules that PEFT adapts for these target_modules."""
    config = AdapterConfig(r=1, lora_alpha=1, target_modules=targets)
    return {module for module in modules if config.targets(module)}


def full_match_regex(paths: Collection[str]) -> str:
    """Returns a regex that matches the paths in full and no other, short where layers repeat.

    >>> full_match_regex(["m.0.q", "m.2.q", "m.0.k", "m.2.k", "head"])
    'head|m\\\\.(?:0|2)\\\\.(?:k|q)'
    """
    # One layer number varies: {(before it, after it): its values}, then the endings that share all values are joined.
    layers: dict[tuple[str, str], list[str]] = {}
    alternatives = set()
    for path in paths:
        match = re.fullmatch(r"((?:[^.]+\.)*?)(\d+)(\..+)", path)
        if match is None:
            alternatives.add(re.escape(path))
        else:
            layers.setdefault((match[1], match[3]), []).append(match[2])
    endings: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (before, after), numbers in layers.items():
        endings.setdefault((before, tuple(sorted(numbers, key=int))), []).append(after.removeprefix("."))
    for (before, numbers), afters in endings.items():
        alternatives.add(f"{re.escape(before)}{_any_of(numbers)}\\.{_any_of([re.escape(a) for a in sorted(afters)])}")
    return "|".join(sorted(alternatives))


def modules_to_save(saved: Collection[str], modules: Collection[str]) -> tuple[str, ...]:
    """Returns names by whose ending PEFT finds exactly the modules ``saved``: the last one, or the whole path where that is too much.

    >>> modules_to_save(["norm"], ["norm", "layers.0.input_layernorm"]), modules_to_save(["lm_head"], ["lm_head", "norm"])
    (('norm',), ('lm_head',))
    """
    names = set()
    for path in saved:
        last = path.rpartition(".")[2]
        names.add(last if all(m in saved for m in modules if m.endswith(last)) else path)
    return tuple(sorted(names))


def used_patterns[T](patterns: Mapping[str, T], unused: Collection[str]) -> dict[str, T]:
    """Returns the patterns without those that decide nothing, about which PEFT would warn."""
    return {key: value for key, value in patterns.items() if key not in unused}


def _any_of(parts: Collection[str]) -> str:
    (first, *others) = parts
    return f"(?:{'|'.join([first, *others])})" if others else first
