"""What was trained, to disk: a PEFT adapter, or a whole checkpoint with its source's names, shards and dtypes.

A merge reads the source one tensor at a time and never the device's copy of a frozen weight, so that what was not trained keeps its bytes.
"""

import collections
import dataclasses
import logging
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conversion.hf_config import dtype_name
from conversion.peft_config import AdapterConfig
from conversion.peft_format import Adapter, write_adapter
from conversion.peft_targets import containers, modules_to_save, target_modules, used_patterns
from conversion.rules import plan
from conversion.safetensors_io import open_checkpoint
from conversion.safetensors_write import Pending, Shard, write_checkpoint
from conversion.small_files import CONFIG, edit_config, read_small_files
from conversion.source import Source, merge_low_rank, reshard
from jaxlora.adapt import LoRAConfig
from jaxlora.errors import raise_all
from jaxlora.load import Loaded, Progress, ignore_equal_heads
from jaxlora.nn.stack import flatten_leaves, linear_paths
from jaxlora.select import expand, is_stacked
from jaxlora.typing import Array, Float
from jaxlora.weights.base import AbstractWeight

log = logging.getLogger(__name__)

type Tree = Mapping[str, Any]
type Place = tuple[Any, int | None]

# Quantisation moves a weight by a tenth; another model's weight is further away than the weight is long.
_FOREIGN = 0.5


def save_adapter(
    folder: str | os.PathLike,
    *,
    trainable: Tree,
    frozen: Tree,
    config: LoRAConfig,
    loaded: Loaded,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
) -> None:
    """Writes a PEFT adapter: every LoRA pair in fp32, what else was trained, and a config that selects exactly these modules.

    ``trainable`` and ``frozen`` are ``adapt.partition``'s trees, after training. r, alpha, patterns, rsLoRA and dropout are
    ``config``'s; ``target_modules`` too where PEFT's rule selects the adapted Linears with it and no other module.

    Raises:
      ValueError: nothing is adapted; ``config`` is not what was trained with (scales or ranks differ); a tensor is not finite.
    """
    pairs, whole = _trained(trainable, frozen)
    if not pairs:
        raise ValueError("no LoRA pair is trained: save_merged writes a model that was trained whole")
    wrong = {
        path: (pair.scale, config.scale(path))
        for path, pair in pairs.items()
        if not math.isclose(pair.scale, config.scale(path), rel_tol=1e-6)
    }
    raise_all(
        "the configuration is not the one that these adapters were trained with",
        [f"{path}: its scale is {got:g}, the configuration says {said:g}" for path, (got, said) in wrong.items()],
    )
    modules = containers(path for stacked in flatten_leaves(nnx.to_pure_dict(nnx.state(loaded.model))) for path in expand(stacked))
    modules |= set(linear_paths(loaded.model))
    described = _describe(config, list(pairs), {path.rpartition(".")[0] for path in whole}, modules)
    described = dataclasses.replace(described, base_model_name_or_path=base_model_name_or_path, revision=revision)
    tensors = {path: {"lora_A": _array(pair.a), "lora_B": _array(pair.b)} for path, pair in pairs.items()}
    write_adapter(folder, Adapter(described, tensors, {path: _array(place) for path, place in whole.items()}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did.

    ``quantisation`` is ‖W - W_q‖ / ‖s·B·A‖ of each adapted weight that was trained on a quantised W_q and merged onto W.
    """

    onto: str
    merged: int
    overwritten: int
    quantisation: Mapping[str, float]

    def describe(self) -> str:
        """One or two lines for the user.

        >>> MergeReport(onto="the original 16-bit weights", merged=2, overwritten=0, quantisation={"a": 0.5, "b": 2.0}).describe()
        '2 adapters merged onto the original 16-bit weights; |quantisation error| / |update|: median 1.25, largest 2 (b)'
        """
        parts = [f"{self.merged} adapters merged onto {self.onto}"] if self.merged else []
        if self.overwritten:
            parts.append(f"{self.overwritten} tensors that were trained whole saved in place of {self.onto}")
        if self.quantisation:
            worst = max(self.quantisation, key=self.quantisation.__getitem__)
            median = statistics.median(self.quantisation.values())
            parts.append(f"|quantisation error| / |update|: median {median:.3g}, largest {self.quantisation[worst]:.3g} ({worst})")
        return "; ".join(parts)


def save_merged(
    folder: str | os.PathLike,
    *,
    trainable: Tree,
    frozen: Tree,
    loaded: Loaded,
    base_folder: str | os.PathLike | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes a Hugging Face model whose adapted weights are W + s·B·A, in fp32 onto the source's W, rounded to the source's dtype.

    Shards, names, dtypes and every byte that was not trained are the source's: the loaded folder, or ``base_folder``, the 16-bit
    original of a quantised one. Without it, a quantised source is dequantised. Tensors that were trained whole replace the source's. A
    head that no longer equals the embedding is written beside it, and the config says so. Host memory is one tensor.

    Raises:
      ValueError: an adapter or trained tensor has no place in the source; a result is not finite; ``base_folder`` is another
        model; nothing is left on disk then.
      FileExistsError: the folder is not empty and ``overwrite`` is False.
    """
    source = _open_source(loaded, base_folder)
    if pathlib.Path(folder).resolve() == source.checkpoint.folder.resolve():
        raise ValueError(f"{folder} is the model that the merge reads from; choose another folder")
    merge = _Merge(source, *_trained(trainable, frozen), _locate(frozen), progress)
    shards = merge.shards()
    merge.require_all()
    if source.dequantised:
        log.warning("%s holds quantised weights: the merge is onto what they decode to, not onto their 16-bit original", loaded.folder)
        shards = reshard([pending for shard in shards for pending in shard.tensors])
    files = read_small_files(source.checkpoint.folder)
    files[CONFIG] = edit_config((source.checkpoint.folder / CONFIG).read_bytes(), untied=merge.untied)
    metadata = source.checkpoint.index_metadata
    if metadata is not None and (source.dequantised or merge.untied):
        metadata = {key: value for key, value in metadata.items() if key != "total_parameters"} if len(shards) > 1 else None
    write_checkpoint(folder, shards, files=files, index_metadata=metadata, overwrite=overwrite)
    assert merge.done == set(merge.pairs), "an adapter was planned and not merged"
    onto = "their dequantised weights" if source.dequantised else "the original weights"
    report = MergeReport(onto=onto, merged=len(merge.done), overwritten=len(merge.whole), quantisation=merge.ratios)
    if report.quantisation and statistics.median(report.quantisation.values()) > 1:
        log.warning("%s; the quantised model that was trained and this one differ by more than the training changed", report.describe())
    return report


@dataclasses.dataclass(frozen=True)
class _Pair:
    a: Place
    b: Place
    scale: float


class _Merge:
    """Plans what every tensor of the source becomes, and makes it when it is written."""

    def __init__(
        self,
        source: Source,
        pairs: Mapping[str, _Pair],
        whole: Mapping[str, Place],
        frozen: Mapping[str, Place],
        progress: Progress | None,
    ):
        self.source, self.pairs, self.whole, self.frozen, self.progress = source, pairs, whole, frozen, progress
        self.planned: set[str] = set()
        self.done: set[str] = set()
        self.ratios: dict[str, float] = {}
        self.untied = any(self._differs(head, embedding) for head, embedding in source.ties.items() if self._equal_on_disk(head))
        self._written, self._total = 0, 0

    def shards(self) -> list[Shard]:
        """The source's files, each with its tensors in order; nothing is read yet."""
        checkpoint, tensors = self.source.checkpoint, collections.defaultdict(list)
        for name, path in self.source.paths().items():
            tensors[checkpoint.info(name).file] += self._pending(name, path)
        self._total = sum(pending.nbytes for listed in tensors.values() for pending in listed)
        return [Shard(file, listed, checkpoint.metadata[file]) for file, listed in tensors.items()]

    def require_all(self) -> None:
        """Raises unless every adapter, and every tensor that was trained whole, has its place in the source."""
        wanted = [f"{path}.weight" for path in self.pairs] + list(self.whole)
        lost = [path for path in wanted if path not in self.planned]
        raise_all(f"{len(lost)} of {len(wanted)} trained tensors have no place in {self.source.checkpoint.folder}", lost)

    def _pending(self, name: str, path: str | None) -> list[Pending]:
        """What becomes of one tensor of the source: itself, and with an embedding the head that was tied to it."""
        dtype, shape = self.source.logical(name)
        if path is None:
            return [self._make(name, dtype, shape, lambda: self.source.read(name))]
        found = [self._make(name, dtype, shape, lambda: self._value(path, self.source.read(name)))]
        for head, embedding in self.source.ties.items():
            disk = self.source.placement.spelling.to_disk(head)
            if embedding == path and disk not in self.source.checkpoint.tensors and self._differs(head, embedding):
                found.append(self._make(disk, dtype, shape, lambda head=head: self._value(head, self.source.read(name))))
                self.planned.add(head)
        self.planned.add(path)
        return found

    def _make(self, name: str, dtype: str, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> Pending:
        def counted() -> np.ndarray:
            array = read()
            self._written += array.nbytes
            if self.progress is not None:
                self.progress(name, self._written, self._total)
            return array

        return Pending(name, dtype, shape, counted)

    def _value(self, path: str, base: np.ndarray) -> np.ndarray:
        """The tensor after training, in the source's dtype; ``base`` is the source's."""
        place, module = self._replacement(path), path.rpartition(".")[0]
        pair = self.pairs.get(module) if path.endswith(".weight") else None
        if place is None and pair is None:
            return base
        value = base if place is None else _array(place)
        if value.shape != base.shape:
            raise ValueError(f"{path} was trained as {list(value.shape)}, but the source holds {list(base.shape)}")
        if pair is None:
            value = value.astype(base.dtype)
        else:
            error = self._quantisation_error(path, value)
            value, update = merge_low_rank(value, _array(pair.a), _array(pair.b), pair.scale, base.dtype)
            if error is not None:
                self.ratios[module] = error / update if update else math.inf
            self.done.add(module)
        bad = value.size - int(np.isfinite(value).sum())
        if bad:
            raise ValueError(f"{path}: {bad} of {value.size} merged values are not finite in {base.dtype}; did training diverge?")
        return value

    def _replacement(self, path: str) -> Place | None:
        """What was trained in a tensor's place; a head that is still tied follows the embedding."""
        shared = path in self.source.ties and path not in self.frozen and path not in self.whole
        return self.whole.get(self.source.ties[path] if shared and self._equal_on_disk(path) else path)

    def _equal_on_disk(self, head: str) -> bool:
        return head not in self.source.placement.placed

    def _differs(self, head: str, embedding: str) -> bool:
        """Whether a head that equals the embedding in the source no longer does."""
        return head in self.whole or head.rpartition(".")[0] in self.pairs or (embedding in self.whole and head in self.frozen)

    def _quantisation_error(self, path: str, weight: np.ndarray) -> float | None:
        """‖W - W_q‖ where the model was trained on a quantised W_q and is merged onto W."""
        place = self.frozen.get(path)
        if place is None or self.source.dequantised or not isinstance(place[0], AbstractWeight) or place[0].trainable:
            return None
        error, norm = (float(v) for v in _distance(_take(place), jnp.asarray(weight)))
        if error > _FOREIGN * norm:
            where = self.source.checkpoint.folder
            raise ValueError(
                f"{path} of {where} is {error / norm:.0%} away from the quantised weight that was trained; is it another model?"
            )
        return error


def _open_source(loaded: Loaded, base_folder: str | os.PathLike | None) -> Source:
    ties, dtype = loaded.spec.rules.ties, dtype_name(loaded.raw_config) or "float16"
    own = Source(open_checkpoint(loaded.folder), loaded.plan, ties, dtype)
    if base_folder is None:
        return own
    checkpoint = open_checkpoint(base_folder)
    rules = ignore_equal_heads(loaded.spec, checkpoint.names())
    placement = plan(checkpoint.names(), [*loaded.plan.placed, *loaded.plan.tied], rules, tied=True)
    if placement.companions:
        raise ValueError(f"{base_folder} holds quantised weights; expected the 16-bit original")
    base = Source(checkpoint, placement, ties, dtype)
    both = [path for path in placement.placed if path in loaded.plan.placed]
    shapes = {path: (base.logical(placement.placed[path])[1], own.logical(loaded.plan.placed[path])[1]) for path in both}
    faults = [f"{path}: {list(got)}, expected {list(want)}" for path, (got, want) in shapes.items() if want != got]
    raise_all(f"{base_folder} is not the original of {loaded.folder}", faults)
    return base


def _trained(trainable: Tree, frozen: Tree) -> tuple[dict[str, _Pair], dict[str, Place]]:
    """The LoRA pairs by module, and every other trained tensor by path."""
    places, scales = _locate(trainable), _locate(frozen)
    modules = [path.removesuffix(".lora_A") for path in places if path.endswith(".lora_A")]
    faults = [f"{m}: {leaf} is missing" for m in modules for leaf in ("lora_B", "lora_scale") if f"{m}.{leaf}" not in {**places, **scales}]
    raise_all("these adapters are incomplete", faults)
    pairs = {m: _Pair(places[f"{m}.lora_A"], places[f"{m}.lora_B"], float(_array(scales[f"{m}.lora_scale"]))) for m in modules}
    return pairs, {path: place for path, place in places.items() if not path.endswith((".lora_A", ".lora_B"))}


def _describe(config: LoRAConfig, adapted: list[str], saved: set[str], modules: set[str]) -> AdapterConfig:
    described = AdapterConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=target_modules(adapted, modules, config.target_modules),
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        modules_to_save=modules_to_save(saved, modules),
        task_type="CAUSAL_LM",
    )
    unused = described.unused_patterns(adapted)
    patterns = {"rank_pattern": used_patterns(config.rank_pattern, unused), "alpha_pattern": used_patterns(config.alpha_pattern, unused)}
    return dataclasses.replace(described, **patterns)


@jax.jit
def _distance(leaf: Any, weight: Float[Array, "O I"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    weight = weight.astype(jnp.float32)
    return jnp.linalg.norm(weight - leaf.dequantise().astype(jnp.float32)), jnp.linalg.norm(weight)


def _locate(tree: Tree) -> dict[str, Place]:
    """Where each path's array is: a leaf, and the layer of a stacked one."""
    leaves = flatten_leaves(tree)
    return {path: (leaf, i if is_stacked(stacked) else None) for stacked, leaf in leaves.items() for i, path in enumerate(expand(stacked))}


def _take(place: Place) -> Any:
    leaf, i = place
    return leaf if i is None else jax.tree.map(lambda a: a[i], leaf)


def _array(place: Place) -> np.ndarray:
    """One layer of one leaf, on the host."""
    (array,) = jax.tree.leaves(_take(place))
    return np.asarray(array)
