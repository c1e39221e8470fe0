"""What every backend of attention shares: the static options, and the interval of keys that a query sees."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

type Query = Float[Array, "B S H C"]
type KeyValue = Float[Array, "B T K C"]
type Segments = tuple[Int[Array, "B M"], Int[Array, "B M"]]
type Reach = Int[Array, "B S"] | None
type LogSumExp = Float[Array, "..."]

# A hidden logit: finite, so that the softmax of a query that sees nothing is a number, which is dropped, and not NaN.
MASKED = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The options that are fixed when a call is traced."""

    causal: bool
    scale: float
    window: int | None = None
    softcap: float | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        if self.longest is not None and self.longest < 1:
            raise ValueError(f"longest must be at least 1 token, got {self.longest}; pass None where segments may be of any length")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (a token sees itself), got {self.window}")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be positive, got {self.softcap}; pass None for no cap")


class Covering(NamedTuple):
    """Segments that leave no position of a row out, so that a backend need not care for those that are in none."""

    starts: Int[Array, "B M"]
    lengths: Int[Array, "B M"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Alike:
    """In place of segments: each row is ``count`` segments of the same length, one after the other. No backend needs to be told more."""

    count: int


class Intervals(NamedTuple):
    """In place of segments: query i sees exactly the keys starts_i <= j < ends_i. The keys may have a length of their own."""

    starts: Int[Array, "B S"]
    ends: Int[Array, "B S"]


def cover(segments: Segments, length: int) -> Covering:
    """Rows whose segments follow each other from column 0 on, with what is left of ``length`` (their padding) as one more segment.

    For training: padding then attends to itself, which costs less than zeroing it in each layer, and nothing reads it.

    >>> covering = cover((jnp.array([[0, 3]]), jnp.array([[3, 2]])), 8)
    >>> covering.starts.tolist(), covering.lengths.tolist()
    ([[0, 3, 5]], [[3, 2, 3]])
    """
    starts, lengths = segments
    end = jnp.max(starts + lengths, axis=1, keepdims=True)
    return Covering(jnp.concatenate([starts, end], axis=1), jnp.concatenate([lengths, jnp.maximum(length - end, 0)], axis=1))


def key_ranges(spec: Spec, segments: Segments, length: int, reach: Reach = None) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """``lo, hi`` such that query i sees key j exactly when lo[i] <= j < hi[i]; empty for a position in no segment.

    Segments are contiguous, so documents, causality (as far as ``reach`` does not lift it) and the window together leave one interval.
    """
    if isinstance(segments, Intervals):
        return segments
    starts, lengths = (x[:, :, None] for x in segments)
    position = jnp.arange(length, dtype=starts.dtype)[None, None, :]
    ends = starts + lengths
    inside = (position >= starts) & (position < ends)
    lo = jnp.sum(jnp.where(inside, starts, 0), axis=1)
    hi = jnp.sum(jnp.where(inside, ends, 0), axis=1)
    if spec.causal:
        hi = jnp.minimum(hi, position[:, 0] + 1 if reach is None else jnp.maximum(position[:, 0] + 1, reach))
    if spec.window is not None:
        lo = jnp.maximum(lo, position[:, 0] - spec.window + 1)
    return lo, hi
