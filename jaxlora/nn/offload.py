"""Blocks that are recomputed from inputs which wait in host memory: one moves in the background while another block runs.

A checkpoint policy that offloads fetches a block's input when its turn comes in the backward, and the device waits for it: 6 % of a step at
8B. Here the backward is written out, so that the input of the block before is on its way while a block runs. Each block saves the input of
the block before it, so that in both directions a step of the scan moves the slice that is its own: XLA copies only such by DMA.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.nn.vjp import Wanted, hoisted, is_zero, values
from jaxlora.typing import Array

type Block = Callable[..., Array]

# While a block runs backwards its elementwise work is done twice, so that a norm's output does not wait through the widest part of the MLP.
_KEPT = jax.checkpoint_policies.save_only_these_names("dot", "attn_out", "attn_lse")


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


def _forward(blocks: Sequence[Block], x: Array, xs: Any, slots: Any, states: Any, consts: Any, *, save: bool) -> tuple[Any, Any]:
    """((x, states), (the last block's input, for each block the inputs of the blocks before it, in host memory))."""

    def body(carry: Any, each: Any) -> tuple[Any, list[Array]]:
        (x, before, states), saved = carry, []
        for block, const, (own, slot) in zip(blocks, consts, each, strict=True):
            states = states if slot is None else states.at[slot].set(x, mode="drop")
            if save:
                saved.append(jax.device_put(before, jax.memory.Space.Host))
                before = x
            x = block(x, *own, *const)
        return (x, before, states), saved

    start = x, x if save else None, states
    (x, before, states), saved = jax.lax.scan(body, start, list(zip(xs, slots, strict=True)))
    return (x, states), (before, saved)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(blocks: tuple[Block, ...], x: Array, xs: Any, slots: Any, states: Any, consts: Any) -> tuple[Array, Any]:
    return _forward(blocks, x, xs, slots, states, consts, save=False)[0]


def _scan_fwd(blocks: tuple[Block, ...], x: Any, xs: Any, slots: Any, states: Any, consts: Any) -> tuple[Any, Any]:
    wanted = tuple(map(Wanted.of, xs)), tuple(map(Wanted.of, consts))
    x, xs, slots, states, consts = values((x, xs, slots, states, consts))
    out, inputs = _forward(blocks, x, xs, slots, states, consts, save=True)
    return out, (*inputs, xs, slots, consts, wanted)


def _scan_bwd(blocks: tuple[Block, ...], residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    last, saved, xs, slots, consts, (wanted_xs, wanted_consts) = residuals
    dx, dstates = cotangents
    dx = jnp.zeros(dx.shape, dx.dtype) if is_zero(dx) else dx
    dstates = None if dstates is None or is_zero(dstates) else dstates

    def body(carry: Any, each: Any) -> tuple[Any, list[Any]]:
        (dx, x, dconsts), (waiting, own, slot) = carry, each
        dconsts, dxs = list(dconsts), [None] * len(blocks)
        for p in reversed(range(len(blocks))):
            here, x = x, jax.device_put(waiting[p], jax.memory.Space.Device)
            mine, const = wanted_xs[p], wanted_consts[p]

            def block(x: Array, few: Any, held: Any, p: int = p, mine: Wanted = mine, const: Wanted = const) -> Array:
                return blocks[p](x, *mine.put(few, own[p]), *const.put(held, consts[p]))

            _, pull = jax.vjp(jax.checkpoint(block, policy=_KEPT), here, mine.of_these(own[p]), const.of_these(consts[p]))
            dx, dxs[p], added = pull(dx)
            dconsts[p] = jax.tree.map(jnp.add, dconsts[p], added)
            if dstates is not None:
                dx = dx + dstates.at[slot[p]].get(mode="fill", fill_value=0)
        return (dx, x, dconsts), dxs

    nothing = [jax.tree.map(jnp.zeros_like, w.of_these(c)) for w, c in zip(wanted_consts, consts, strict=True)]
    (dx, _, dconsts), dxs = jax.lax.scan(body, (dx, last, nothing), (saved, xs, slots), reverse=True)
    return (
        dx,
        tuple(w.gradient(d, own) for w, d, own in zip(wanted_xs, dxs, xs, strict=True)),
        None,
        None,
        tuple(w.gradient(d, own) for w, d, own in zip(wanted_consts, dconsts, consts, strict=True)),
    )


_scan.defvjp(_scan_fwd, _scan_bwd, symbolic_zeros=True)
