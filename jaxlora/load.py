"""A checkpoint folder to a model on the device: every tensor read once, quantised there, put into its place in the stacks.

Host memory is one tensor; device memory is the loaded model and the tensor in hand.
"""

import collections
import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conversion.formats import bnb
from conversion.rules import Plan, Rules, plan
from conversion.safetensors_io import Checkpoint, open_checkpoint
from conversion.stream import stream
from jaxlora.errors import raise_all
from jaxlora.models import registry
from jaxlora.models.spec import ModelSpec
from jaxlora.nn.linear import Linear
from jaxlora.nn.stack import edit_linears, flatten_leaves, linear_paths, linears, nest
from jaxlora.select import expand, is_stacked
from jaxlora.typing import Array, Int
from jaxlora.weights.base import AbstractWeight
from jaxlora.weights.dense import Dense
from jaxlora.weights.float8 import Float8
from jaxlora.weights.int4 import Int4
from jaxlora.weights.nf4 import NF4
from pallas_kernels import device

log = logging.getLogger(__name__)

QUANT_TYPES = ("int4", "nf4")

# Path segments whose Linears stay in 16 bits when a checkpoint is quantised on loading (Unsloth's list; embeddings, norms and
# convolutions are no Linears and always stay).
KEPT = (
    "lm_head multi_modal_projector merger modality_projection router block_sparse_moe mamba audio_tower vision_tower vision_embedder "
    "embed_vision embed_audio score classifier qa_outputs deepstack_merger_list"
).split()

type Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """How to load. ``dtype`` None: bfloat16 on an accelerator, float32 on a CPU; ``max_seq_length`` None: the model's own limit.

    ``compute_dtype`` "float8": the Linears that `KEPT` does not name multiply in e4m3 (`weights.float8`), whatever stores them.
    """

    load_in_4bit: bool = False
    quant_type: str = "int4"
    dtype: Any = None
    compute_dtype: str | None = None
    max_seq_length: int | None = None

    def __post_init__(self):
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type must be one of {QUANT_TYPES}, got {self.quant_type!r}")
        if self.compute_dtype not in (None, "float8"):
            raise ValueError(f'compute_dtype must be None (that of the activations) or "float8", got {self.compute_dtype!r}')

    @property
    def activation_dtype(self) -> Any:
        """The dtype of activations and of unquantised weights."""
        if self.dtype is not None:
            return jnp.dtype(self.dtype)
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model, where it came from, and what each Linear is stored as ({path: format name}; ``kept``: {path: why it is 16-bit})."""

    model: nnx.Module
    spec: ModelSpec
    config: Any
    raw_config: Mapping[str, Any]
    folder: pathlib.Path
    plan: Plan
    formats: Mapping[str, str]
    kept: Mapping[str, str]

    @property
    def prequantised(self) -> bool:
        """Whether the checkpoint itself holds quantised weights."""
        return bool(self.plan.companions)


def load(folder: str | pathlib.Path, config: LoadConfig = LoadConfig(), *, progress: Progress | None = None) -> Loaded:
    """Loads a Hugging Face folder of safetensors.

    A weight that bitsandbytes quantised to 4 bits stays exactly what it is; with ``load_in_4bit`` the other Linears are quantised
    on the device, but for those that ``KEPT`` names. ``progress(name, done bytes, all bytes)`` is called after each tensor.

    Raises:
      ValueError: the folder is incomplete or broken, or its tensors are not this architecture's (all strays and gaps are listed).
      NotImplementedError: an architecture or a config key that is not modelled; "float8" on a GPU that has none.
    """
    if config.compute_dtype == "float8":
        refuse_float8()
    folder = pathlib.Path(folder)
    raw = read_config(folder)
    spec = registry.get(raw["model_type"])
    checkpoint = open_checkpoint(folder)
    model_config = _with_tie(spec, spec.read(raw), checkpoint)
    if config.max_seq_length is not None:
        model_config = spec.lengthen(model_config, config.max_seq_length)
    dtype = config.activation_dtype
    model = spec.build(model_config, dtype=dtype)
    wanted = [path for stacked in flatten_leaves(nnx.to_pure_dict(nnx.state(model))) for path in expand(stacked)]
    tied = model_config.tie_word_embeddings
    rules = ignore_equal_heads(spec, checkpoint.names()) if tied else spec.rules
    placement = plan(checkpoint.names(), wanted, rules, tied=tied)
    formats, kept = _choose_formats(linear_paths(model), placement, checkpoint, config)
    edit_linears(model, functools.partial(_set_format, formats=formats, dtype=dtype))
    _fill(model, checkpoint, placement, progress)
    if config.compute_dtype == "float8":
        multiply_in_float8(model)
    names = {path: type(leaf).__name__ for path, leaf in formats.items()}
    return Loaded(model=model, spec=spec, config=model_config, raw_config=raw, folder=folder, plan=placement, formats=names, kept=kept)


def multiply_in_float8(model: nnx.Module) -> None:
    """Has every Linear that `KEPT` does not name multiply in e4m3; what its weight is stored as stays."""
    for path, linear in linears(model).items():
        if linear.weight is not None and not kept_segment(path):
            linear.weight.set_value(Float8.of(linear.weight.get_value()))


def refuse_float8() -> None:
    """Raises where the GPU multiplies no e4m3; a CPU emulates it.

    Raises:
      NotImplementedError: says what the GPU is.
    """
    lacking = device().lacks((8, 9)) if jax.default_backend() == "gpu" else None
    if lacking:
        raise NotImplementedError(f'compute_dtype="float8" {lacking}; leave it out to multiply in bfloat16')


def kept_segment(path: str) -> str | None:
    """The part of a Linear's path for which it keeps its precision, or None."""
    return next((s for s in path.split(".") if s in KEPT), None) or ("mlp.gate" if path.endswith("mlp.gate") else None)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
      ValueError: there is no such folder or file, or it names no model_type.
    """
    path = folder / "config.json"
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{str(folder)!r} {what}; expected a Hugging Face model folder")
    raw = json.loads(path.read_text())
    if "model_type" not in raw:
        raise ValueError(f"{path} names no model_type; is it a model's config?")
    return raw


def describe_formats(loaded: Loaded) -> str:
    """One line for the banner: how many Linears are packed how, which were left as they are and why, and the dtypes of all the rest."""
    counts, reasons = collections.Counter(loaded.formats.values()), collections.Counter(loaded.kept.values())
    leaves = flatten_leaves(nnx.to_pure_dict(nnx.state(loaded.model)))
    unpacked = [leaf for leaf in leaves.values() if not isinstance(leaf, AbstractWeight) or leaf.trainable]
    dtypes = " and ".join(sorted({str(array.dtype) for leaf in unpacked for array in jax.tree.leaves(leaf)}))
    float8 = sum(len(expand(path)) for path, leaf in leaves.items() if isinstance(leaf, Float8))
    multiplied = f"; {float8} Linears multiply in float8" if float8 else ""
    if not counts:
        return f"{dtypes} throughout{multiplied}"
    packed = ", ".join(f"{n} Linears {name}" for name, n in counts.most_common())
    kept = ", ".join(f"{n} {why}" for why, n in reasons.most_common())
    return f"{packed}; the rest {dtypes}" + (f", Linears among it: {kept}" if kept else "") + multiplied


def _with_tie(spec: ModelSpec, config: Any, checkpoint: Checkpoint) -> Any:
    """A tied config whose file holds a head that differs from the embedding is untied: the file wins, and the log says so."""
    if not config.tie_word_embeddings:
        return config
    names = checkpoint.names()
    spelling = spec.rules.detect(names)
    for head, embedding in spec.rules.ties.items():
        on_disk = {path: spelling.to_disk(path) for path in (head, embedding)}
        if on_disk[head] in names and not np.array_equal(checkpoint.read(on_disk[head]), checkpoint.read(on_disk[embedding])):
            log.warning("config.json ties %s to %s, but the file holds two different tensors: loaded untied", head, embedding)
            return dataclasses.replace(config, tie_word_embeddings=False)
    return config


def ignore_equal_heads(spec: ModelSpec, names: list[str]) -> Rules:
    """The rules for a tied model whose file may hold the head as well, equal to the embedding."""
    spelling = spec.rules.detect(names)
    return dataclasses.replace(spec.rules, ignore=(*spec.rules.ignore, *map(spelling.to_disk, spec.rules.ties)))


def _choose_formats(
    paths: Iterable[str], placement: Plan, checkpoint: Checkpoint, config: LoadConfig
) -> tuple[dict[str, AbstractWeight], dict[str, str]]:
    """An abstract leaf of the chosen format for every Linear that is not simply dense, by path; and why the others stay dense."""
    formats: dict[str, AbstractWeight] = {}
    kept: dict[str, str] = {}
    for path in paths:
        parts = placement.companions.get(f"{path}.weight")
        if parts is not None and "SCB" not in parts:
            name = placement.placed[f"{path}.weight"]
            state = bnb.state_suffix(parts)
            if not state:
                raise ValueError(f"{name} has {sorted(parts)} but no quantisation state; is the checkpoint complete?")
            formats[path] = NF4.abstract_like(bnb.read_structure(name, state, checkpoint.read(parts[state])))
        elif parts is not None:
            kept[path] = "stored as int8, decoded on loading"
        elif placement.companions:
            kept[path] = "not quantised in the checkpoint"
        elif config.load_in_4bit:
            segment = kept_segment(path)
            if segment:
                kept[path] = f"{segment} (keeps its precision)"
            else:
                formats[path] = Int4.abstract((1, 1), jnp.float32) if config.quant_type == "int4" else NF4.abstract((1, 64), jnp.float32)
    return formats, kept


def _set_format(path: str, linear: Linear, *, formats: Mapping[str, AbstractWeight], dtype: Any) -> None:
    leaf = formats.get(path)
    if leaf is None or linear.weight is None:
        return
    linear.weight.set_value(leaf if leaf.shape == linear.features else type(leaf).abstract(linear.features, dtype))  # pyright: ignore[reportAttributeAccessIssue]


def _fill(model: nnx.Module, checkpoint: Checkpoint, placement: Plan, progress: Progress | None) -> None:
    leaves = flatten_leaves(nnx.to_pure_dict(nnx.state(model)))
    where = {path: (stacked, i if is_stacked(stacked) else None) for stacked in leaves for i, path in enumerate(expand(stacked))}
    # A leaf of one layer is taken as it comes; only stacks are filled piece by piece.
    stacks = {stacked: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), leaf) for stacked, leaf in leaves.items() if is_stacked(stacked)}
    leaves |= stacks
    del stacks
    total = sum(checkpoint.info(name).nbytes for name in placement.placed.values())
    done, faults = 0, []
    for path, tensor in stream(checkpoint, placement):
        stacked, i = where[path]
        like = leaves[stacked]
        try:
            leaves[stacked] = _put(like, tensor, i)
        except ValueError as error:
            faults.append(f"{path}: {error}")
        done += checkpoint.info(placement.placed[path]).nbytes
        if progress is not None:
            progress(path, done, total)
    raise_all(f"{checkpoint.folder} does not fit its config.json", faults)
    nnx.update(model, nest(leaves))


def _put(like: Any, tensor: Any, i: int | None) -> Any:
    """Decodes or quantises one tensor as ``like`` is stored, into layer ``i`` of it (or as the whole of it)."""
    if isinstance(tensor, bnb.Int8Tensor):
        tensor = bnb.dequantise_int8(tensor)
    expected = like.shape if isinstance(like, AbstractWeight) else like.shape[0 if i is None else 1 :]
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"has shape {tuple(tensor.shape)}, the config says {tuple(expected)}")
    new = _encode(like, tensor)
    if i is None:
        return new
    # Waiting keeps one tensor in flight: dispatch would otherwise run ahead and pile them up on the device.
    return jax.block_until_ready(_insert(like, new, jnp.int32(i)))


def _encode(like: Any, tensor: Any) -> Any:
    if isinstance(tensor, bnb.QuantizedTensor):
        return NF4.from_stored(tensor)
    array = jnp.asarray(tensor)
    match like:
        case Int4():
            return Int4.quantise(array, like.dtype)
        case NF4():
            return NF4.quantise(array, like.dtype, double_quant=like.nested is not None)
        case Dense():
            return Dense(array.astype(like.array.dtype))
        case _:
            return array.astype(like.dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack: Any, new: Any, i: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda whole, one: jax.lax.dynamic_update_index_in_dim(whole, one, i, 0), stack, new)
