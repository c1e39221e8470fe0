"""Blocks that are recomputed from inputs which wait in host memory: one moves in the background while another block runs.

A checkpoint policy that offloads fetches a block's input when its turn comes in the backward, and the device waits for it: 6 % of a step at
8B. Here the backward is written out, so that the input of the block before is on its way while a block runs. Each block saves the input of
the block before it, so that in both directions a step of the scan moves the slice that is its own: XLA copies only such by DMA.

With the inputs travel the few columns A x of each adapter, whose products would be repeated to no other end; and in long rows, where
attention is what costs most to recompute, its output and log-sum-exp.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.nn.vjp import Wanted, hoisted, is_zero, values
from jaxlora.typing import Array

type Block = Callable[..., Array]

_SAVED = ("lora_u",)
_SAVED_OF_LONG_ROWS = (*_SAVED, "attn_out", "attn_lse")
# Tokens in a row from which attention is kept. Its output waits on the device as a block's input does, once for the block and once for the
# next: in shorter rows that memory is dearer than recomputing it.
_LONG = 8192


def scan_offloaded(
    blocks: Sequence[Block], x: Array, xs: Sequence[Any], slots: Sequence[Array | None], states: Array | None
) -> tuple[Array, Array | None]:
    """Scans x through periods of ``blocks``: ``block(x, *each) -> (x, None)`` gets a slice of its own ``xs``.

    Every block's input goes to host memory. Where a block has ``slots`` [periods], its input is also written to that slot of ``states``; a
    slot beyond the last is none. Returns (x, states).
    """
    converted, consts = [], []
    for block, own in zip(blocks, xs, strict=True):
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), own)
        call, over = hoisted(lambda x, *each, block=block: block(x, *each)[0], jax.ShapeDtypeStruct(x.shape, x.dtype), *one)
        converted.append(call)
        consts.append(over)
    return _scan(tuple(converted), x, tuple(xs), slots, states, tuple(consts))


def _linearise(
    block: Block, x: Array, own: Any, const: Any, wanted: tuple[Wanted, Wanted]
) -> tuple[Array, list[Array], Callable[[Array, Sequence[Array]], Any]]:
    """(block(x), what to save of it beside x, ``pull(dy, saved)``: the gradients by x and by what is wanted of ``own`` and ``const``)."""
    mine, theirs = wanted

    def call(x: Array, few: Any, held: Any) -> Array:
        return block(x, *mine.put(few, own), *theirs.put(held, const))

    names = _SAVED_OF_LONG_ROWS if x.shape[-2] >= _LONG else _SAVED
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    out, pull = jax.vjp(jax.checkpoint(call, policy=policy, prevent_cse=False), x, mine.of_these(own), theirs.of_these(const))
    leaves, treedef = jax.tree.flatten(pull)
    # What ``pull`` holds of the arguments are the very same arrays: the rest is what the policy saves.
    given = {id(leaf) for leaf in jax.tree.leaves((x, own, const))}
    places = [i for i, leaf in enumerate(leaves) if id(leaf) not in given]

    def resume(dy: Array, saved: Sequence[Array]) -> Any:
        filled = dict(enumerate(leaves)) | dict(zip(places, saved, strict=True))
        return treedef.unflatten([filled[i] for i in range(len(leaves))])(dy)

    return out, [leaves[i] for i in places], resume


def _forward(blocks: Sequence[Block], x: Array, xs: Any, slots: Any, states: Any, consts: Any, wanted: Any = None) -> tuple[Any, Any]:
    """((x, states), (what the last block saves, for each block what the blocks before it save, in host memory)).

    A block saves its input and what `_linearise` says; without ``wanted`` nothing.
    """

    def run(p: int, x: Array, own: Any) -> tuple[Array, list[Array]]:
        if wanted is None:
            return blocks[p](x, *own, *consts[p]), []
        return _linearise(blocks[p], x, own, consts[p], (wanted[0][p], wanted[1][p]))[:2]

    def body(carry: Any, each: Any) -> tuple[Any, list[Any]]:
        (x, before, states), sent = carry, []
        for p, (own, slot) in enumerate(each):
            states = states if slot is None else states.at[slot].set(x, mode="drop")
            if wanted is not None:
                sent.append(jax.device_put(before, jax.memory.Space.Host))
            here, (x, saved) = x, run(p, x, own)
            before = None if wanted is None else [here, *saved]
        return (x, before, states), sent

    last = len(blocks) - 1
    saved = jax.eval_shape(lambda x, own: run(last, x, own)[1], x, jax.tree.map(lambda a: a[0], xs[last]))
    nothing = None if wanted is None else [x, *(jnp.zeros(a.shape, a.dtype) for a in saved)]
    (x, before, states), sent = jax.lax.scan(body, (x, nothing, states), list(zip(xs, slots, strict=True)))
    return (x, states), (before, sent)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(blocks: tuple[Block, ...], x: Array, xs: Any, slots: Any, states: Any, consts: Any) -> tuple[Array, Any]:
    return _forward(blocks, x, xs, slots, states, consts)[0]


def _scan_fwd(blocks: tuple[Block, ...], x: Any, xs: Any, slots: Any, states: Any, consts: Any) -> tuple[Any, Any]:
    wanted = tuple(map(Wanted.of, xs)), tuple(map(Wanted.of, consts))
    x, xs, slots, states, consts = values((x, xs, slots, states, consts))
    out, saved = _forward(blocks, x, xs, slots, states, consts, wanted)
    return out, (*saved, xs, slots, consts, wanted)


def _scan_bwd(blocks: tuple[Block, ...], residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    last, sent, xs, slots, consts, (wanted_xs, wanted_consts) = residuals
    dx, dstates = cotangents
    dx = jnp.zeros(dx.shape, dx.dtype) if is_zero(dx) else dx
    dstates = None if dstates is None or is_zero(dstates) else dstates

    def body(carry: Any, each: Any) -> tuple[Any, list[Any]]:
        (dx, before, dconsts), (waiting, own, slot) = carry, each
        dconsts, dxs = list(dconsts), [None] * len(blocks)
        for p in reversed(range(len(blocks))):
            (here, *kept), before = before, jax.device_put(waiting[p], jax.memory.Space.Device)
            pull = _linearise(blocks[p], here, own[p], consts[p], (wanted_xs[p], wanted_consts[p]))[2]
            dx, dxs[p], added = pull(dx, kept)
            dconsts[p] = jax.tree.map(jnp.add, dconsts[p], added)
            if dstates is not None:
                dx = dx + dstates.at[slot[p]].get(mode="fill", fill_value=0)
        return (dx, before, dconsts), dxs

    nothing = [jax.tree.map(jnp.zeros_like, w.of_these(c)) for w, c in zip(wanted_consts, consts, strict=True)]
    (dx, _, dconsts), dxs = jax.lax.scan(body, (dx, last, nothing), (sent, xs, slots), reverse=True)
    return (
        dx,
        tuple(w.gradient(d, own) for w, d, own in zip(wanted_xs, dxs, xs, strict=True)),
        None,
        None,
        tuple(w.gradient(d, own) for w, d, own in zip(wanted_consts, dconsts, consts, strict=True)),
    )


_scan.defvjp(_scan_fwd, _scan_bwd, symbolic_zeros=True)
