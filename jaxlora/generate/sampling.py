"""From logits to the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlora.typing import Array, Float, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose; names and defaults as in transformers. Greedy unless ``do_sample``."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if self.do_sample and self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}; for greedy decoding set do_sample=False")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1:
            raise ValueError(f"expected top_p in (0, 1] and min_p in [0, 1), got top_p={self.top_p}, min_p={self.min_p}")


def next_token(logits: Float[Array, "B V"], sampling: Sampling, key: PRNGKeyArray) -> Int[Array, " B"]:
    """The arg-max, or a draw from softmax(logits / temperature) restricted to top-k, then top-p, then min-p.

    >>> next_token(jnp.array([[0.0, 2.0, 1.0]]), Sampling(), jax.random.key(0)).tolist()
    [1]
    """
    if not sampling.do_sample:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores = logits.astype(jnp.float32) / sampling.temperature
    order = jnp.argsort(-scores, axis=-1)
    ranked = jnp.take_along_axis(scores, order, axis=-1)
    ranks = jnp.arange(ranked.shape[-1])[None]
    kept = ranks < (sampling.top_k or ranked.shape[-1])
    probabilities = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    # A token stays while what ranks before it has less than top_p; the first always stays.
    kept &= jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
    kept &= probabilities >= sampling.min_p * probabilities[:, :1]
    choice = jax.random.categorical(key, jnp.where(kept, ranked, -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
