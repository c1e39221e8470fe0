"""What every backend of attention shares: the static options, and the interval of keys that a query sees."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

type Query = Float[Array, "B S H C"]
type KeyValue = Float[Array, "B S K C"]
type Segments = tuple[Int[Array, "B M"], Int[Array, "B M"]]
type LogSumExp = Float[Array, "..."]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The options that are fixed when a call is traced."""

    causal: bool
    scale: float
    window: int | None
    softcap: float | None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (a token sees itself), got {self.window}")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be positive, got {self.softcap}; pass None for no cap")


def key_ranges(spec: Spec, segments: Segments, length: int) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """``lo, hi`` such that query i sees key j exactly when lo[i] <= j < hi[i]; empty for a position in no segment.

    Segments are contiguous, so documents, causality and the window together leave one interval.
    """
    starts, lengths = (x[:, :, None] for x in segments)
    position = jnp.arange(length, dtype=starts.dtype)[None, None, :]
    ends = starts + lengths
    inside = (position >= starts) & (position < ends)
    lo = jnp.sum(jnp.where(inside, starts, 0), axis=1)
    hi = jnp.sum(jnp.where(inside, ends, 0), axis=1)
    if spec.causal:
        hi = jnp.minimum(hi, position[:, 0] + 1)
    if spec.window is not None:
        lo = jnp.maximum(lo, position[:, 0] - spec.window + 1)
    return lo, hi
