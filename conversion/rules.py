"""Names on disk to module paths and back: an architecture's rename table, and the plan that accounts for every tensor.

A *disk* name is what a checkpoint calls a tensor; a *path* is Hugging Face's newest module-tree name of it. A checkpoint
uses one spelling throughout, and an export writes that spelling again, so a spelling must be invertible.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from conversion._faults import describe, nearest, raise_all
from conversion.formats import bnb

# Buffers that very old files stored, and that every model computes.
COMPUTED = ("*rotary_emb.inv_freq", "*rotary_pos_emb.inv_freq", "*embeddings.position_ids")
# What torch wrapped round a model before it was saved: PEFT's prefix.
PEFT_PREFIX = "base_model.model"
# LayerNorm's names in files converted from TensorFlow.
_OLD_LEAVES = {"gamma": "weight", "beta": "bias"}


@dataclasses.dataclass(frozen=True)
class Rename:
    """One line of a table: names under the module ``disk`` are under ``path`` in the model; ``*`` stands for one segment.

    >>> Rename("visual", "model.visual").path
    'model.visual'
    """

    disk: str
    path: str

    def __post_init__(self):
        if self.disk.split(".").count("*") != self.path.split(".").count("*"):
            raise ValueError(
                f"{self.disk!r} and {self.path!r} have different numbers of '*', so that neither can be computed from the other"
            )


def same(*modules: str) -> tuple[Rename, ...]:
    """Returns the lines for modules that are spelled alike on disk and in the model.

    >>> same("model", "lm_head")[1]
    Rename(disk='lm_head', path='lm_head')
    """
    return tuple(Rename(m, m) for m in modules)


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A bijection between disk names and paths. The most specific line wins, so their order means nothing.

    >>> hub = Spelling("hub", (Rename("visual", "model.visual"), Rename("model", "model.language_model"), *same("lm_head")))
    >>> hub.to_path("model.norm.weight"), hub.to_disk("model.visual.merger.ln_q.weight")
    ('model.language_model.norm.weight', 'visual.merger.ln_q.weight')

    Raises:
      ValueError: if two lines start from, or lead to, the same module.
    """

    name: str
    renames: tuple[Rename, ...]

    def __post_init__(self):
        for side in ([r.disk for r in self.renames], [r.path for r in self.renames]):
            doubles = sorted({s for s in side if side.count(s) > 1})
            if doubles:
                raise ValueError(f"spelling {self.name!r} is not invertible: {doubles} appear in more than one line")

    def to_path(self, disk_name: str) -> str:
        """Returns the model's path of a tensor, module or quantisation companion on disk (``gamma``, ``beta``: ``weight``, ``bias``).

        Raises:
          ValueError: if the name does not fit this spelling.
        """
        path, _ = self._forward(disk_name)
        if path is None:
            raise ValueError(f"{disk_name!r} does not fit spelling {self.name!r}, which knows {sorted(r.disk for r in self.renames)}")
        return path

    def to_disk(self, path: str) -> str:
        """Returns the name on disk of a path: the inverse of ``to_path`` but for ``gamma`` and ``beta``, which a ``Plan`` remembers.

        Raises:
          ValueError: if no disk name leads to this path.
        """
        disk, _ = _rename(path, [(r.path, r.disk) for r in self.renames])
        if disk is None or _rename(disk, [(r.disk, r.path) for r in self.renames])[0] != path:
            raise ValueError(f"no name of spelling {self.name!r} leads to {path!r}; it knows {sorted(r.path for r in self.renames)}")
        return disk

    def fits(self, disk_name: str) -> int:
        """Returns how many segments of the name the table recognises; 0 if it does not fit."""
        return self._forward(disk_name)[1]

    def under(self, prefix: str) -> "Spelling":
        """Returns this spelling for names that all stand under one more module."""
        renames = tuple(Rename(f"{prefix}.{r.disk}", r.path) for r in self.renames)
        return Spelling(f"{self.name} under {prefix}", renames)

    def _forward(self, disk_name: str) -> tuple[str | None, int]:
        path, matched = _rename(disk_name, [(r.disk, r.path) for r in self.renames])
        # A name that the inverse would send elsewhere belongs to another spelling.
        if path is None or _rename(path, [(r.path, r.disk) for r in self.renames])[0] != disk_name:
            return None, 0
        module, _, leaf = path.rpartition(".")
        return (f"{module}.{_OLD_LEAVES[leaf]}" if leaf in _OLD_LEAVES else path), matched


@dataclasses.dataclass(frozen=True)
class Rules:
    """An architecture's table: the spellings it is found in, names to ignore (globs), and paths that may equal another.

    ``ties`` maps a path that a tied checkpoint lacks to the path that it equals.

    >>> llama = Rules((Spelling("hub", same("model", "lm_head")),), ties={"lm_head.weight": "model.embed_tokens.weight"})
    >>> llama.detect(["model.norm.weight"]).name
    'hub'
    """

    spellings: tuple[Spelling, ...]
    ignore: tuple[str, ...] = ()
    ties: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def ignores(self, disk_name: str) -> bool:
        return any(fnmatchcase(disk_name, pattern) for pattern in (*COMPUTED, *self.ignore))

    def detect(self, disk_names: Iterable[str], wanted_paths: Collection[str] = ()) -> Spelling:
        """Returns the spelling, with or without a leading ``base_model.model.``, that the names use.

        It is the one under which most names lead to a wanted path; then the one that most names fit; then the one that
        recognises most of each name (``model.visual.x`` fits both ``model`` and ``model.visual``); then the first.

        Raises:
          ValueError: if some names fit no spelling, or fit only different ones; it lists them.
        """
        names, wanted = [n for n in disk_names if not self.ignores(n)], set(wanted_paths)
        candidates = [*self.spellings, *(s.under(PEFT_PREFIX) for s in self.spellings)]

        def score(spelling: Spelling) -> tuple[int, int, int]:
            found = [spelling._forward(n) for n in names]
            return sum(p in wanted for p, _ in found), sum(p is not None for p, _ in found), sum(matched for _, matched in found)

        best = max(candidates, key=score)
        misfits = [n for n in names if not best.fits(n)]
        if misfits:
            known = ", ".join(f"{s.name} ({', '.join(r.disk for r in s.renames)})" for s in self.spellings)
            what = f"{len(misfits)} of {len(names)} names do not fit spelling {best.name!r}, the nearest of {known}"
            raise_all(what, describe(misfits, repr))
        return best


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where every wanted tensor comes from. ``placed`` keeps the names exactly as they are on disk.

    ``companions`` gives, for a quantised weight's path, the disk names of its quantisation state by suffix.
    """

    spelling: Spelling
    placed: Mapping[str, str]
    companions: Mapping[str, Mapping[str, str]]
    tied: Mapping[str, str]
    ignored: tuple[str, ...]


def plan(disk_names: Sequence[str], wanted_paths: Collection[str], rules: Rules, *, tied: bool = False) -> Plan:
    """Places every wanted path exactly once, and uses every disk name exactly once.

    ``tied`` is the config's tie flag: with it a path of ``rules.ties`` may be absent on disk. A tied path that is on disk
    is placed as any other; whether it differs, and so is untied, is for the caller to compare.

    >>> rules = Rules((Spelling("hub", same("model", "lm_head")),), ties={"lm_head.weight": "model.embed.weight"})
    >>> plan(["model.embed.weight"], ["model.embed.weight", "lm_head.weight"], rules, tied=True).tied
    {'lm_head.weight': 'model.embed.weight'}

    Raises:
      ValueError: one error that lists all strays (on disk, unwanted), gaps (wanted, not on disk) and doubles.
    """
    wanted, present = set(wanted_paths), set(disk_names)
    weight_names = {name: weight for name in disk_names if (weight := bnb.weight_of(name)) in present}
    spelling = rules.detect([n for n in disk_names if n not in weight_names], wanted)
    sources: dict[str, list[str]] = {}
    strays, ignored = [], []
    companions: dict[str, dict[str, str]] = {}
    for name in disk_names:
        if name in weight_names:
            companions.setdefault(spelling.to_path(weight_names[name]), {})[bnb.suffix_of(name)] = name
        elif spelling.fits(name) and spelling.to_path(name) in wanted:
            sources.setdefault(spelling.to_path(name), []).append(name)
        elif rules.ignores(name):
            ignored.append(name)
        else:
            strays.append(name)
    for path in [p for p in companions if p not in sources]:
        strays.extend(companions.pop(path).values())
    absent = [p for p in wanted_paths if p not in sources]
    ties = {p: rules.ties[p] for p in absent if tied and rules.ties.get(p) in sources}
    gaps = [p for p in absent if p not in ties]
    doubles = [p for p, names in sources.items() if len(names) > 1]
    _raise_unaccounted(spelling, rules, sources, strays=strays, gaps=gaps, doubles=doubles)
    return Plan(spelling, {p: names[0] for p, names in sources.items()}, companions, ties, tuple(ignored))


def _raise_unaccounted(spelling: Spelling, rules: Rules, sources: Mapping[str, list[str]], *, strays, gaps, doubles) -> None:
    stray_paths = {n: spelling.to_path(n) for n in strays if spelling.fits(n)}

    def gap(path: str) -> str:
        untied = f"; it may equal {rules.ties[path]!r}, but the config says that it is not tied" if path in rules.ties else ""
        return f"gap: {path!r} is in the model but not on disk{nearest(path, stray_paths.values())}{untied}"

    faults = describe(strays, lambda n: f"stray: {n!r} is on disk but not in the model{nearest(stray_paths.get(n, n), gaps)}")
    faults += describe(gaps, gap)
    faults += describe(doubles, lambda p: f"double: {p!r} comes from {sources[p]}")
    counts = f"{len(strays)} strays, {len(gaps)} gaps and {len(doubles)} doubles"
    raise_all(f"the checkpoint (spelling {spelling.name!r}) and the model do not match: {counts}", faults)


def _rename(name: str, table: Sequence[tuple[str, str]]) -> tuple[str | None, int]:
    """Returns the renamed name and the number of segments that the most specific line matched; None and 0 if none did."""
    segments = name.split(".")
    best: tuple[str | None, int] = (None, 0)
    for source, target in table:
        pattern = source.split(".")
        matches = len(pattern) <= len(segments) and all(p in ("*", s) for p, s in zip(pattern, segments, strict=False))
        if matches and len(pattern) > best[1]:
            stars = iter([s for p, s in zip(pattern, segments, strict=False) if p == "*"])
            head = [next(stars) if t == "*" else t for t in target.split(".")]
            best = ".".join(head + segments[len(pattern) :]), len(pattern)
    return best
