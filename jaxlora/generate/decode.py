"""Decoding with a cache of static size: one program for the prompt, one loop on the device for the new tokens."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlora.data.batches import Batch
from jaxlora.generate.sampling import Sampling, next_token
from jaxlora.nn.decoder import Execution
from jaxlora.typing import Array, Int, PRNGKeyArray


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "sampling", "eos", "pad", "dtype"))
def generate(
    graphdef: Any,
    state: Mapping[str, Any],
    prompt: Batch,
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos: tuple[int, ...],
    pad: int,
    dtype: Any,
) -> tuple[Int[Array, "B new"], Int[Array, " B"]]:
    """Returns (new tokens, how many of each row count): a row stops after its first ``eos`` token and is then padded.

    ``prompt`` is one micro-batch whose rows begin at column 0 in one segment each. The adapter is used as it is, not merged.
    """
    model = nnx.merge(graphdef, state)
    rows, columns = prompt.input_ids.shape
    lengths = prompt.segment_lengths[:, 0]
    caches = model.init_caches(rows, columns + max_new_tokens, dtype)
    hidden, caches = model(prompt, Execution(), caches=caches, column=jnp.zeros(rows, jnp.int32))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    key, first_key = jax.random.split(key)
    first = next_token(model.head().logits(last), sampling, first_key)
    inside = jnp.arange(columns)[None] < lengths[:, None]
    positions = prompt.position_ids
    ends = jax.tree.map(lambda a: jnp.take_along_axis(a, (lengths - 1)[:, None], axis=1), (prompt.seen_starts, prompt.seen_lengths))
    next_position = jnp.where(inside, positions if positions.ndim == 2 else positions.max(0), 0).max(-1) + 1

    def go_on(carry: Any) -> Array:
        t, _, _, done, _, _ = carry
        return (t < max_new_tokens) & ~jnp.all(done)

    def one(carry: Any) -> Any:
        t, tokens, current, done, caches, key = carry
        key, draw = jax.random.split(key)
        step = _one_token(prompt, current, next_position + t - 1, ends)
        hidden, caches = model(step, Execution(), caches=caches, column=lengths + t - 1)
        chosen = next_token(model.head().logits(hidden[:, 0]), sampling, draw)
        chosen = jnp.where(done, pad, chosen)
        return t + 1, tokens.at[:, t].set(chosen), chosen, done | _is_eos(chosen, eos), caches, key

    tokens = jnp.full((rows, max_new_tokens), pad, jnp.int32).at[:, 0].set(first)
    start = (jnp.int32(1), tokens, first, _is_eos(first, eos), caches, key)
    _, tokens, _, _, _, _ = jax.lax.while_loop(go_on, one, start)
    ended = _is_eos(tokens, eos)
    count = jnp.where(ended.any(-1), ended.argmax(-1) + 1, max_new_tokens)
    return tokens, count


def _one_token(prompt: Batch, token: Int[Array, " B"], position: Int[Array, " B"], seen: tuple[Any, Any]) -> Batch:
    """``seen``: the images that the prompt's last token sees are what new ones see too."""
    positions = position[:, None] if prompt.position_ids.ndim == 2 else jnp.broadcast_to(position[None, :, None], (3, token.size, 1))
    zeros = jnp.zeros((token.size, 1), jnp.int32)
    return Batch(
        input_ids=token[:, None],
        labels=zeros,
        position_ids=positions,
        segment_starts=zeros,
        segment_lengths=jnp.ones_like(zeros),
        seen_starts=seen[0],
        seen_lengths=seen[1],
    )


def _is_eos(tokens: Int[Array, "..."], eos: tuple[int, ...]) -> Array:
    return jnp.isin(tokens, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros(tokens.shape, bool)
