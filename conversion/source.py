"""A checkpoint that a merge writes onto: each tensor decoded, one at a time, and the low-rank update in the host's fp32."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from conversion.formats import bnb
from conversion.rules import Plan
from conversion.safetensors_io import DTYPES, Checkpoint
from conversion.safetensors_write import Pending, Shard

# Rows are merged in blocks of this many numbers: the fp32 copies stay small beside the tensor itself.
_BLOCK = 2**24
_SHARD_BYTES = 5 * 10**9
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint, where its tensors belong, and which head (a path) may equal which embedding.

    ``dtype`` is what int8 weights, which do not say what they were, decode to ("bfloat16", "float16", "float32").
    """

    checkpoint: Checkpoint
    placement: Plan
    ties: Mapping[str, str]
    dtype: str

    @property
    def dequantised(self) -> bool:
        """Whether some of its weights are quantised, and so are decoded."""
        return bool(self.placement.companions)

    def paths(self) -> dict[str, str | None]:
        """Returns the path of every tensor on disk but quantisation states; None for those that the model has no place for.

        A head that was ignored because it equals the embedding has its path.
        """
        placed = {name: path for path, name in self.placement.placed.items()}
        heads = {self.placement.spelling.to_disk(head): head for head in self.ties}
        states = {name for parts in self.placement.companions.values() for name in parts.values()}
        return {name: placed.get(name, heads.get(name)) for name in self.checkpoint.names() if name not in states}

    def logical(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Returns the safetensors dtype and the shape of a tensor, decoded, without reading it."""
        parts, info = self._states(name), self.checkpoint.info(name)
        state = bnb.state_suffix(parts)
        if state:
            structure = bnb.read_structure(name, state, self.checkpoint.read(parts[state]))
            return _NAMES[structure.dtype], structure.shape
        return (_NAMES[self.dtype] if parts else info.dtype), info.shape

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor, decoded."""
        parts, tensor = self._states(name), self.checkpoint.read(name)
        if not parts:
            return tensor
        stored = bnb.decode(name, tensor, {suffix: self.checkpoint.read(part) for suffix, part in parts.items()})
        if isinstance(stored, bnb.Int8Tensor):
            return bnb.dequantise_int8(stored).astype(DTYPES[_NAMES[self.dtype]])
        return bnb.dequantise(stored)

    def _states(self, name: str) -> Mapping[str, str]:
        return self._states_by_name.get(name, {})

    @functools.cached_property
    def _states_by_name(self) -> dict[str, Mapping[str, str]]:
        return {self.placement.placed[path]: parts for path, parts in self.placement.companions.items()}


def merge_low_rank(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, dtype: np.dtype) -> tuple[np.ndarray, float]:
    """Returns W + s·(B·A), computed in fp32 and rounded once to ``dtype``, and ‖s·B·A‖; W is [out, in], A [r, in], B [out, r].

    >>> merged, size = merge_low_rank(np.zeros((2, 2)), np.ones((1, 2), np.float32), np.ones((2, 1), np.float32), 0.5, np.dtype("f4"))
    >>> merged.tolist(), size
    ([[0.5, 0.5], [0.5, 0.5]], 1.0)
    """
    merged, squares = np.empty(weight.shape, dtype), 0.0
    rows = max(1, _BLOCK // weight.shape[1])
    for start in range(0, len(weight), rows):
        block = slice(start, start + rows)
        update = np.float32(scale) * (b[block] @ a)
        squares += float(np.vdot(update, update))
        # What overflows is for the caller to report by name.
        with np.errstate(over="ignore", invalid="ignore"):
            merged[block] = (weight[block].astype(np.float32) + update).astype(dtype)
    return merged, math.sqrt(squares)


def reshard(tensors: Sequence[Pending]) -> list[Shard]:
    """Returns files of at most 5 GB, or one tensor, for decoded weights: they are four times what their source's files held."""
    groups: list[list[Pending]] = [[]]
    size = 0
    for pending in tensors:
        if groups[-1] and size + pending.nbytes > _SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(pending)
        size += pending.nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]
