"""Blocks that are recomputed from inputs which wait in host memory: one moves in the background while another block runs.

A checkpoint policy that offloads fetches a block's input when its turn comes in the backward, and the device waits for it: 6 % of a step at
8B. Here the backward is written out, so that the input of the block before is on its way while a block runs. Each block saves the input of
the block before it, so that in both directions a step of the scan moves the slice that is its own: XLA copies only such by DMA.

With the inputs travel the few columns A x of each adapter, whose products would be repeated to no other end; and in long rows, where
attention is what costs most to recompute, its output and log-sum-exp.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.nn.vjp import Wanted, hoisted, is_zero, linearise, values
from jaxlora.typing import Array

type Block = Callable[..., tuple[Array, None]]

_SAVED = ("lora_u",)
_SAVED_OF_LONG_ROWS = (*_SAVED, "attn_out", "attn_lse")
# Tokens in a row from which attention is kept. Its output waits on the device as a block's input does, once for the block and once for the
# next: in shorter rows that memory is dearer than recomputing it.
_LONG = 8192


def scan_offloaded(block: Block, x: Array, xs: Any, slots: Array | None, states: Array | None) -> tuple[Array, Array | None]:
    """Scans x through layers that are all alike: ``block(x, own) -> (x, None)`` gets a slice of ``xs``.

    Every block's input goes to host memory. Where there are ``slots`` [layers], it is also written to its slot of ``states``; a slot
    beyond the last is none. Returns (x, states).
    """
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), xs)
    call, over = hoisted(block, jax.ShapeDtypeStruct(x.shape, x.dtype), one)
    return _scan(call, x, xs, slots, states, over)


def recomputing(x: Array) -> dict[str, Any]:
    """The arguments of `jax.checkpoint` for a block of such an input."""
    names = _SAVED_OF_LONG_ROWS if x.shape[-2] >= _LONG else _SAVED
    return {"policy": jax.checkpoint_policies.save_only_these_names(*names), "prevent_cse": False}


def _forward(block: Block, x: Array, xs: Any, slots: Any, states: Any, const: Any, wanted: Any = None) -> tuple[Any, Any]:
    """((x, states), (what the last block saves, for each block what the block before it saves, in host memory)).

    A block saves its input and what `linearise` says; without ``wanted`` nothing.
    """

    def run(x: Array, own: Any) -> tuple[Array, list[Array]]:
        if wanted is None:
            return block(x, own, *const)[0], []
        (x, _), saved, _ = linearise(block, x, own, const, wanted, recomputing(x), keep=True)
        return x, saved

    def body(carry: Any, each: Any) -> tuple[Any, Any]:
        (x, before, states), (own, slot) = carry, each
        states = states if slot is None else states.at[slot].set(x, mode="drop")
        sent = None if wanted is None else jax.device_put(before, jax.memory.Space.Host)
        here, (x, saved) = x, run(x, own)
        return (x, None if wanted is None else [here, *saved], states), sent

    saved = jax.eval_shape(lambda x, own: run(x, own)[1], x, jax.tree.map(lambda a: a[0], xs))
    nothing = None if wanted is None else [x, *(jnp.zeros(a.shape, a.dtype) for a in saved)]
    (x, before, states), sent = jax.lax.scan(body, (x, nothing, states), (xs, slots))
    return (x, states), (before, sent)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(block: Block, x: Array, xs: Any, slots: Any, states: Any, const: Any) -> tuple[Array, Any]:
    return _forward(block, x, xs, slots, states, const)[0]


def _scan_fwd(block: Block, x: Any, xs: Any, slots: Any, states: Any, const: Any) -> tuple[Any, Any]:
    wanted = Wanted.of(xs), Wanted.of(const)
    x, xs, slots, states, const = values((x, xs, slots, states, const))
    out, saved = _forward(block, x, xs, slots, states, const, wanted)
    return out, (*saved, xs, slots, const, wanted)


def _scan_bwd(block: Block, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    last, sent, xs, slots, const, wanted = residuals
    dx, dstates = cotangents
    dx = jnp.zeros(dx.shape, dx.dtype) if is_zero(dx) else dx
    dstates = None if dstates is None or is_zero(dstates) else dstates

    def body(carry: Any, each: Any) -> tuple[Any, Any]:
        ((dx, (here, *kept), dconst), (waiting, own, slot)) = carry, each
        before = jax.device_put(waiting, jax.memory.Space.Device)
        pull = linearise(block, here, own, const, wanted, recomputing(here), keep=True)[2]
        dx, down, added = pull((dx, None), kept)
        if dstates is not None:
            dx = dx + dstates.at[slot].get(mode="fill", fill_value=0)
        return (dx, before, jax.tree.map(jnp.add, dconst, added)), down

    nothing = jax.tree.map(jnp.zeros_like, wanted[1].of_these(const))
    (dx, _, dconst), dxs = jax.lax.scan(body, (dx, last, nothing), (sent, xs, slots), reverse=True)
    return dx, wanted[0].gradient(dxs, xs), None, None, wanted[1].gradient(dconst, const)


_scan.defvjp(_scan_fwd, _scan_bwd, symbolic_zeros=True)
