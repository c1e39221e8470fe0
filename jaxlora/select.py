"""Which Linears get an adapter: flags, suffix lists and regexes become counted sets of paths.

Works on plain path strings (Hugging Face's module names); knows neither models nor arrays.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxlora.errors import nearest, raise_all

TOWERS = ("vision", "language", "connector")
KINDS = ("attention", "mlp", "other")

# Sub-strings of a path segment, as Unsloth's get_peft_regex classifies them.
_CONNECTOR = ("merger", "projector", "connector", "modality_projection")
_VISION = ("vision", "image", "visual", "patch")
_ATTENTION = ("self_attn", "cross_attn", "attention", "attn", "mixer")
_MLP = ("mlp", "feed_forward", "ffn", "dense", "mixer")

_RANGE = re.compile(r"\d+(,\d+)*:\d+:\d+")


@functools.lru_cache(maxsize=65536)
def classify(path: str) -> tuple[str, str]:
    """Returns (tower, kind) of a Linear.

    >>> classify("model.visual.blocks.0.attn.qkv")
    ('vision', 'attention')
    >>> classify("model.language_model.layers.3.mlp.up_proj")
    ('language', 'mlp')
    >>> classify("model.visual.merger.mlp.0")
    ('connector', 'other')
    """
    segments = path.split(".")

    def tagged(tags: Sequence[str]) -> bool:
        return any(tag in segment for segment in segments for tag in tags)

    if tagged(_CONNECTOR):
        return "connector", "other"
    tower = "vision" if tagged(_VISION) else "language"
    return tower, "attention" if tagged(_ATTENTION) else "mlp" if tagged(_MLP) else "other"


def layers_of(key: str) -> list[int]:
    """Returns the layers of a range ``start,…:stop:step`` in order: every step-th one from each start on.

    >>> layers_of("1:6:2"), layers_of("0,1:8:4")
    ([1, 3, 5], [0, 1, 4, 5])
    """
    starts, stop, step = key.split(":")
    return sorted(layer for start in starts.split(",") for layer in range(int(start), int(stop), int(step)))


def expand(path: str) -> list[str]:
    """Returns the path of each layer of a stacked path, whose layer segment is a range as `layers_of` has it.

    >>> expand("model.layers.1:6:2.mlp.up_proj")
    ['model.layers.1.mlp.up_proj', 'model.layers.3.mlp.up_proj', 'model.layers.5.mlp.up_proj']
    """
    segments = path.split(".")
    at = [i for i, segment in enumerate(segments) if _RANGE.fullmatch(segment)]
    if not at:
        return [path]
    (i,) = at
    return [".".join([*segments[:i], str(layer), *segments[i + 1 :]]) for layer in layers_of(segments[i])]


def is_stacked(path: str) -> bool:
    """Whether a path names layers stacked on one leaf."""
    return any(_RANGE.fullmatch(segment) for segment in path.split("."))


@dataclasses.dataclass(frozen=True)
class Selection:
    """A counted set of Linear paths.

    ``paths`` are the selected ones, ``total`` counts all Linears of the model by (tower, kind), ``counts`` the selected ones.
    """

    paths: tuple[str, ...]
    total: Mapping[tuple[str, str], int]

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """How many Linears were selected, by (tower, kind)."""
        return dict(collections.Counter(map(classify, self.paths)))

    def describe(self) -> str:
        """Returns one line: what was selected out of what there is.

        >>> by_flags(["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"], mlp=False).describe()
        '1 of 2 Linears: language attention 1/1, language mlp 0/1'
        """
        counts = self.counts
        parts = [f"{tower} {kind} {counts.get((tower, kind), 0)}/{n}" for (tower, kind), n in sorted(self.total.items(), key=_order)]
        return f"{len(self.paths)} of {sum(self.total.values())} Linears: {', '.join(parts)}"

    def mask(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Returns one bool for each leaf of a nested dict: whether it belongs to a selected Linear.

        The tree's keys are path segments; a segment ``start,…:stop:step`` stands for stacked layers. Works as the mask of ``optax.masked``.

        Raises:
          ValueError: where some but not all layers of a stacked leaf are selected; names the layers.
        """
        chosen, faults = set(self.paths), []

        def visit(node: Any, segments: tuple[str, ...]) -> Any:
            if isinstance(node, Mapping):
                return {key: visit(value, (*segments, str(key))) for key, value in node.items()}
            parents = [path.rpartition(".")[0] for path in expand(".".join(segments))]
            hits = [parent for parent in parents if parent in chosen]
            if 0 < len(hits) < len(parents):
                missing = sorted(set(parents) - set(hits))
                faults.append(
                    f"{'.'.join(segments)}: selected for {len(hits)} of {len(parents)} stacked layers, not for {', '.join(missing[:4])}"
                )
            return bool(hits)

        result = visit(tree, ())
        raise_all("a stacked leaf is trained whole or not at all", faults)
        return result


def by_flags(
    paths: Iterable[str],
    *,
    vision: bool = True,
    language: bool = True,
    attention: bool = True,
    mlp: bool = True,
    targets: str | Sequence[str] | None = None,
) -> Selection:
    """Selects the Linears of the towers and kinds that are switched on; ``targets`` narrows them.

    ``targets`` is None (all leaves of those towers and kinds), a list of suffixes as in PEFT, ``"all-linear"`` (adds the connector
    when vision is on), or a regex that must match a whole path. The connector (merger, projector) and ``lm_head`` are only ever
    picked by an explicit name or regex, or (connector) by "all-linear". A flag that is False is obeyed always.

    Raises:
      ValueError: nothing is switched on; a target hits nothing (the nearest names are given); a regex hits what a flag switches off.

    >>> by_flags(["model.visual.blocks.0.attn.qkv", "model.language_model.layers.0.self_attn.q_proj"], vision=False).paths
    ('model.language_model.layers.0.self_attn.q_proj',)
    """
    paths = tuple(paths)
    towers = {t for t, on in (("vision", vision), ("language", language)) if on}
    kinds = {k for k, on in (("attention", attention), ("mlp", mlp)) if on}
    if not towers:
        raise ValueError("no layers to fine-tune: vision and language are both switched off")
    if not kinds and not isinstance(targets, list | tuple):
        raise ValueError("no modules to fine-tune: attention and mlp are both switched off")
    everything = towers == {"vision", "language"} and kinds == {"attention", "mlp"}

    def switched_on(path: str) -> bool:
        tower, kind = classify(path)
        if tower == "connector":
            return vision
        return tower in towers and (kind in kinds or kind == "other")

    if targets is None:
        hits = [p for p in paths if classify(p)[0] in towers and classify(p)[1] in kinds]
        if not hits:
            have = ", ".join(f"{t} {k}" for t, k in sorted({classify(p) for p in paths}, key=lambda c: _order((c, 0))))
            raise ValueError(f"the flags select nothing: wanted {sorted(towers)} x {sorted(kinds)}, but this model's Linears are {have}")
        return _selection(paths, hits)
    if targets == "all-linear":
        return _selection(paths, [p for p in paths if switched_on(p) and not _is_head(p)])
    hits = by_pattern(paths, targets).paths
    if isinstance(targets, str):
        off = [p for p in hits if not switched_on(p)]
        raise_all(f"the regex {targets!r} selects what a finetune_* flag switches off", off)
        return _selection(paths, hits)
    kept = [p for p in hits if everything or switched_on(p)]
    dead = [t for t in targets if not any(_suffix(p, t) for p in kept)]
    raise_all(
        "a target selects nothing that the finetune_* flags leave switched on",
        [f"{t!r}: its Linears are {sorted({' '.join(classify(p)) for p in hits if _suffix(p, t)})}" for t in dead],
    )
    return _selection(paths, kept)


def by_pattern(paths: Iterable[str], pattern: str | Sequence[str]) -> Selection:
    """Selects as PEFT does: a string is a regex that must match a whole path, a list holds path suffixes.

    A suffix without a dot never picks a connector Linear that shares it with a tower's layers.

    Raises:
      ValueError: for every suffix (or the regex) that hits nothing, with the nearest names.

    >>> by_pattern(["model.layers.0.self_attn.q_proj", "lm_head"], ["q_proj"]).paths
    ('model.layers.0.self_attn.q_proj',)
    """
    paths = tuple(paths)
    if isinstance(pattern, str):
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"target_modules={pattern!r} is not a regex: {error}") from error
        hits = [p for p in paths if regex.fullmatch(p)]
        if not hits:
            raise ValueError(
                f"the regex {pattern!r} matches no Linear in full{_near(pattern, paths)}; the first Linears are {list(paths[:4])}"
            )
        return _selection(paths, hits)
    if not pattern:
        raise ValueError("target_modules is an empty list: name at least one Linear, or leave it None")
    chosen: set[str] = set()
    faults = []
    for target in pattern:
        hits = [p for p in paths if _suffix(p, target)]
        in_towers = [p for p in hits if classify(p)[0] != "connector"]
        if in_towers and "." not in target:
            hits = in_towers
        if not hits:
            faults.append(f"{target!r}{_near(target, paths)}")
        chosen.update(hits)
    raise_all("these targets match no Linear of the model", faults)
    return _selection(paths, [p for p in paths if p in chosen])


def of_layers(selection: Selection, layers: Sequence[int] | None, layers_pattern: str | Sequence[str] | None = None) -> Selection:
    """Keeps the Linears of these layers (None: all), by PEFT's ``layers_to_transform`` and ``layers_pattern``.

    A Linear's layer is the number after an element of ``layers_pattern``, or without one the first number in its path; a Linear with no
    number is dropped. In a vision-language model a layer number means blocks of both towers unless a pattern says otherwise.

    >>> both = by_pattern(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"], ["up_proj"])
    >>> of_layers(both, [1]).paths
    ('model.layers.1.mlp.up_proj',)

    Raises:
      ValueError: a layer that no selected Linear is in; a pattern without layers.
    """
    patterns = (layers_pattern,) if isinstance(layers_pattern, str) else tuple(layers_pattern or ())
    if layers is None:
        if patterns:
            raise ValueError(f"layers_pattern={layers_pattern!r} needs layers_to_transform")
        return selection
    indices = {path: _layer(path, patterns) for path in selection.paths}
    missing = sorted(set(layers) - set(indices.values()))
    if missing:
        there = sorted({i for i in indices.values() if i is not None})
        raise ValueError(f"layers {missing} hold no selected Linear; the selected ones are in layers {there}")
    return dataclasses.replace(selection, paths=tuple(path for path, i in indices.items() if i in set(layers)))


def _layer(path: str, patterns: Sequence[str]) -> int | None:
    segments = path.split(".")
    for before, segment in zip(segments, segments[1:], strict=False):
        if segment.isdigit() and (not patterns or before in patterns):
            return int(segment)
    return None


def _selection(paths: Sequence[str], hits: Sequence[str]) -> Selection:
    return Selection(paths=tuple(hits), total=dict(collections.Counter(map(classify, paths))))


def _suffix(path: str, target: str) -> bool:
    return path == target or path.endswith("." + target)


def _is_head(path: str) -> bool:
    return path.split(".")[-1] == "lm_head"


def _near(target: str, paths: Sequence[str]) -> str:
    return nearest(target, dict.fromkeys([*(p.split(".")[-1] for p in paths), *paths]))


def _order(item: tuple[tuple[str, str], Any]) -> tuple[int, int]:
    (tower, kind), _ = item
    return TOWERS.index(tower), KINDS.index(kind)
