"""Blocks that are recomputed from what waits in host memory, from where it moves in the background while blocks run.

A checkpoint policy that offloads fetches a block's input when its turn comes in the backward, and the device waits for it: 6 % of a step at
8B. Here the backward is written out: while a block runs, what the block before it begins with is on its way, and so is what the block
itself needs later. It all moves by DMA, for which XLA must know each slice's place from a loop's counter. What a block saves is sent in its
own turn, from buffers that are free again when the next block wants them.

With the inputs travel the few columns A x of each adapter, whose products would be repeated to no other end; and in long rows, where
attention is what costs most to recompute, its output and log-sum-exp. Where products are long enough to hide more behind them, all that
attention needs travels, and the sum of its output and the input, from which the MLP is recomputed: attention then runs once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.nn import host
from jaxlora.nn.vjp import Wanted, hoisted, is_zero, linearise, put, scan_with_kernels, shapes_of_one, take, unknown_zero, values
from jaxlora.typing import Array
from jaxlora.weights.base import is_weight

type Block = Callable[..., tuple[Array, None]]

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
# Tokens in a row from which attention's output is kept. It waits on the device as a block's input does, once for the block and once for the
# next: in shorter rows that memory is dearer than recomputing it.
_LONG = 8192
# Arithmetic of products for each byte that travels, from which the copies cost less than recomputing: they hide behind some 14,000 on an
# H100 (700 TFLOP/s, and 50 GB/s to the host), and a forward that waits for them is made up for by its backward down to this.
_FLOP_A_BYTE = 10_000


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Kept:
    """Names of what is kept of a block beside its input: what its backward begins with, and what it needs later on.

    Where there is something ``late``, the backward begins with what is ``early``, and the input is late too.
    """

    early: tuple[str, ...]
    late: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.early, *self.late)

    def how(self) -> dict[str, Any]:
        """The arguments of `jax.checkpoint`, from which what is late comes in host memory."""
        names = {"names_which_can_be_saved": self.early, "names_which_can_be_offloaded": self.late}
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(**names, offload_src="device", offload_dst="pinned_host")
        return {"policy": policy, "prevent_cse": False}


_COLUMNS = Kept(("lora_u",))
_OUTPUT = Kept(("lora_u", "attn_out", "attn_lse"))
ATTENTION = Kept(("lora_u", "residual"), ("attn_out", "attn_lse", "qkv", "unnormed"))


def recomputing(x: Array) -> dict[str, Any]:
    """The arguments of `jax.checkpoint` for a block of such an input, whatever its products."""
    return _least(x).how()


def _least(x: Array) -> Kept:
    return _OUTPUT if x.shape[-2] >= _LONG else _COLUMNS


def _kept(block: Block, x: Array, xs: Any, const: Any, wanted: tuple[Wanted, Wanted]) -> Kept:
    """What is kept of each block: all that attention needs, where products hide its way and the host has room."""
    layers, one = len(jax.tree.leaves(xs)[0]), shapes_of_one(xs)
    saved = jax.eval_shape(lambda x, own: linearise(block, x, own, const, wanted, ATTENTION.how(), keep=True)[1], x, one)
    nbytes = x.nbytes + sum(a.size * a.dtype.itemsize for a in saved)
    weights = [w for w in jax.tree.leaves(xs, is_leaf=is_weight) if is_weight(w)]
    # In e4m3 two multiplications take the time of one.
    flop = x.size // x.shape[-1] * sum((2 if w.decoded else 1) * math.prod(w.shape) for w in weights)
    fits = layers * nbytes <= host.room_bytes()
    return ATTENTION if fits and flop >= _FLOP_A_BYTE * nbytes else _least(x)


def scan_offloaded(block: Block, x: Array, xs: Any, slots: Array | None, states: Array | None) -> tuple[Array, Array | None]:
    """Scans x through layers that are all alike: ``block(x, own) -> (x, None)`` gets a slice of ``xs``.

    Every block's input goes to host memory. Where there are ``slots`` [layers], it is also written to its slot of ``states``; a slot
    beyond the last is none. Returns (x, states).
    """
    call, over = hoisted(block, jax.ShapeDtypeStruct(x.shape, x.dtype), shapes_of_one(xs))
    return _scan(call, x, xs, slots, states, over)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(block: Block, x: Array, xs: Any, slots: Any, states: Any, const: Any) -> tuple[Array, Any]:
    return _forward(lambda x, own: (block(x, own, *const)[0], None), x, xs, slots, states)[0]


def _forward(run: Callable[[Array, Any], tuple[Array, Any]], x: Array, xs: Any, slots: Any, states: Any) -> tuple[tuple[Array, Any], Any]:
    """((x, states), what ``run(x, own) -> (x, sent)`` sends of each layer)."""

    def body(carry: Any, each: Any) -> tuple[Any, Any]:
        (x, states), (own, slot) = carry, each
        states = states if slot is None else states.at[slot].set(x, mode="drop")
        x, sent = run(x, own)
        return (x, states), sent

    return scan_with_kernels(body, (x, states), (xs, slots))


def _scan_fwd(block: Block, x: Any, xs: Any, slots: Any, states: Any, const: Any) -> tuple[Any, Any]:
    wanted = Wanted.of(xs), Wanted.of(const)
    x, xs, slots, states, const = values((x, xs, slots, states, const))
    kept = _kept(block, x, xs, const, wanted)

    def run(x: Array, own: Any) -> tuple[Array, tuple[list[Array | None], list[Array | None]]]:
        (out, _), saved, _ = linearise(block, x, own, const, wanted, kept.how(), keep=True)
        # What `jax.checkpoint` has sent must not be sent again.
        late = [jax.device_put(x, _HOST) if kept.late else None, *(a if jax.typeof(a).memory_space == _HOST else None for a in saved)]
        early = [jax.device_put(a, _HOST) if b is None else None for a, b in zip((x, *saved), late, strict=True)]
        return out, (early, late)

    out, sent = _forward(run, x, xs, slots, states)
    return out, (sent, kept, xs, slots, const, wanted)


def _scan_bwd(block: Block, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    (early, late), kept, xs, slots, const, wanted = residuals
    dx, dstates = cotangents
    dx = jnp.zeros(dx.shape, dx.dtype) if is_zero(dx) else dx
    dstates = None if dstates is None or is_zero(dstates) else dstates
    layers, zero = len(jax.tree.leaves(early)[0]), unknown_zero()

    def first_of(layer: Array) -> list[Array | None]:
        """What a layer's backward begins with, on the device."""
        return jax.device_put(take(early, layer), _DEVICE)

    def body(done: Array, carry: Any) -> Any:
        (dx, first, dconst, dxs), layer = carry, layers - 1 - done
        # Before the first layer there is none: what is fetched then is not used.
        before = first_of(layer - 1)
        here, *saved = [b if a is None else a for a, b in zip(first, take(late, layer), strict=True)]
        here = jax.device_put(here, _DEVICE)
        # What stays on the device is read by kernels.
        layer = layer + zero
        pull = linearise(block, here, take(xs, layer), const, wanted, kept.how(), keep=True)[2]
        dx, down, added = pull((dx, None), saved)
        if dstates is not None:
            dx = dx + dstates.at[slots[layer]].get(mode="fill", fill_value=0)
        return dx, before, jax.tree.map(jnp.add, dconst, added), put(dxs, layer, down)

    nothing = [jax.tree.map(jnp.zeros_like, w.of_these(tree)) for w, tree in ((wanted[1], const), (wanted[0], xs))]
    dx, _, dconst, dxs = jax.lax.fori_loop(0, layers, body, (dx, first_of(jnp.int32(layers - 1)), *nothing))
    return dx, wanted[0].gradient(dxs, xs), None, None, wanted[1].gradient(dconst, const)


_scan.defvjp(_scan_fwd, _scan_bwd, symbolic_zeros=True)
