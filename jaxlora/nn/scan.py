"""How runs of layers are scanned; and the scan of a run in which layers of several kinds take turns.

`jax.lax.scan` would slice, keep and differentiate each position of a period on its own. Here the layers of a kind are one stack, from which
each takes its part by number, and the backward is written out: a kind's forward and backward are two functions of the program, however many
layers of a period call them, and write a layer's gradients to its place in the stack's.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.nn.offload import recomputing
from jaxlora.nn.vjp import Wanted, hoisted, is_zero, linearise, put, shapes_of_one, take, values
from jaxlora.typing import Array, Int

type Policy = Callable[..., Any]
type Remat = Policy | None
type Block = Callable[..., tuple[Array, Any]]

# Bytes. An adapter's matrices, a weight's scales.
_SMALL = 4 << 20
_COLUMNS = jax.checkpoint_policies.save_only_these_names("lora_u")


def _waits(stacked: Array) -> bool:
    """Whether what is made of a layer's part takes memory: of a large array or, by way of the layer's number, of a stack."""
    return stacked.nbytes > stacked.shape[0] * _SMALL or (stacked.ndim == 1 and jnp.issubdtype(stacked.dtype, jnp.integer))


def _is_known(stacked: Array) -> bool:
    """Whether these are numbers that XLA is to know: of layers whose weights a product reads where they are. No other kernel has them."""
    return stacked.ndim == 1 and jnp.issubdtype(stacked.dtype, jnp.unsignedinteger)


@dataclasses.dataclass(frozen=True)
class Scan:
    """How layers are scanned. With ``checkpoint``, each block is recomputed in the backward, but for what the policy ``remat`` saves (None:
    nothing but its input). ``columns`` saves the R columns A·x of each adapter where all layers of a run are alike; layers of several kinds
    are recomputed whole, by the forward's own function of each kind. With ``offload`` the blocks' inputs are in pinned host memory, beside
    them what `jaxlora.nn.offload` says, and nothing else is kept; layers then return nothing of their own. ``unroll`` periods are compiled
    one after the other, all of them where there are fewer; None: all of a run whose layers are alike, and one of any other, which has as
    many layers as a period. ``in_place``: where a run is not looped, products read 16-bit weights in their stacks.

    Raises:
      ValueError: ``offload`` or ``columns`` without ``checkpoint`` or with a policy; ``offload`` with unrolling, which it would not follow.
    """

    checkpoint: bool = False
    remat: Remat = None
    columns: bool = False
    offload: bool = False
    unroll: int | None = 1
    in_place: bool = False

    def __post_init__(self) -> None:
        if self.offload and (not self.checkpoint or self.columns or self.remat is not None or self.unroll != 1):
            raise ValueError(f"offload recomputes all of each block, one at a time: it needs checkpoint and nothing else, got {self}")
        if self.columns and (not self.checkpoint or self.remat is not None):
            raise ValueError(f"columns are saved where blocks are recomputed: they need checkpoint, and no policy beside them, got {self}")

    @property
    def policy(self) -> Remat:
        """What is saved of layers that are all alike."""
        return _COLUMNS if self.columns else self.remat


@dataclasses.dataclass(frozen=True)
class Run:
    """``repeats`` periods of layers, from layer ``start`` on. ``kinds`` are a period's structures, numbered as they appear."""

    start: int
    kinds: tuple[int, ...]
    repeats: int

    @property
    def stop(self) -> int:
        """One past its last layer."""
        return self.start + len(self.kinds) * self.repeats

    @property
    def keys(self) -> tuple[str, ...]:
        """One ``start,…:stop:step`` a kind: the layers that are stacked together, as `jaxlora.select.layers_of` has them.

        >>> Run(start=0, kinds=(0, 0, 1), repeats=4).keys
        ('0,1:12:3', '2:12:3')
        """
        starts: dict[int, list[str]] = {}
        for p, kind in enumerate(self.kinds):
            starts.setdefault(kind, []).append(str(self.start + p))
        return tuple(f"{','.join(of_kind)}:{self.stop}:{len(self.kinds)}" for of_kind in starts.values())

    def places(self, period: int) -> list[int]:
        """For each layer of a period, its place in the stack of its kind.

        >>> Run(start=0, kinds=(0, 0, 1), repeats=4).places(1)
        [2, 3, 1]
        """
        return [period * self.kinds.count(kind) + self.kinds[:p].count(kind) for p, kind in enumerate(self.kinds)]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is scanned and how: ``blocks[kind](x, own, *const) -> (x, out)``."""

    run: Run
    scan: Scan
    blocks: tuple[Block, ...]

    @property
    def policy(self) -> Remat:
        """What is saved of a layer."""
        return self.scan.policy if len(self.blocks) == 1 else self.scan.remat

    @property
    def plain(self) -> bool:
        """Whether the backward has all of each block computed again as the forward did."""
        return self.scan.checkpoint and not self.scan.offload and self.policy is None

    @property
    def unroll(self) -> int:
        """How many periods are compiled one after the other."""
        if self.scan.unroll is None:
            return self.run.repeats if len(self.blocks) == 1 else 1
        return min(self.scan.unroll, self.run.repeats)

    def how(self, x: Array) -> tuple[Mapping[str, Any] | None, bool]:
        """(arguments of `jax.checkpoint` or None, whether anything is kept beside the blocks' inputs), as `linearise` has them."""
        if self.scan.offload:
            return recomputing(x), True
        if self.plain or not self.scan.checkpoint:
            return None, not self.plain
        return {"policy": self.policy, "prevent_cse": False}, True

    def moved(self, tree: Any, to: Any) -> Any:
        """The tree; moved, where the blocks' inputs wait in host memory."""
        return jax.device_put(tree, to) if self.scan.offload else tree

    def part(self, stacked: Any, i: Array, turn: Array) -> Any:
        """Layer i's part. ``turn`` is i when it is the layer's turn, for which leaves wait: what is made of them takes memory. Without a
        loop, where more is kept anyway, small ones do not wait: many small things are made of them, for which nothing then has to."""
        looped = self.unroll < self.run.repeats or self.run.repeats == 1
        # Unknown to XLA: with the number in them, no two layers would have a kernel in common. In a loop it would fail to work it out.
        (ahead,) = (turn,) if self.plain or looped else _in_turn(i)
        return jax.tree.map(lambda a: take(a, i if _is_known(a) else turn if _waits(a) else ahead), stacked)

    def empty_outs(self, x: Array, owns: Sequence[Any], consts: Sequence[Any]) -> list[Any]:
        """Room for what the layers of each kind return."""
        outs = [jax.eval_shape(b, x, shapes_of_one(own), *const)[1] for b, own, const in zip(self.blocks, owns, consts, strict=True)]
        counts = [self.run.kinds.count(kind) * self.run.repeats for kind in range(len(outs))]
        return [jax.tree.map(lambda a, n=n: jnp.zeros((n, *a.shape), a.dtype), out) for out, n in zip(outs, counts, strict=True)]

    def loop(self, body: Callable[[Any, Any], Any], carry: Any, xs: Any, *, reverse: bool = False) -> tuple[Any, Any]:
        """Scans ``body(carry, (places, x)) -> (carry, y)`` over the periods' places in the stacks, and ``xs``."""
        run, repeats = self.run, self.run.repeats
        # Read from arrays: computed, they would be a part of each kernel, and no two layers would have a kernel in common.
        places = [jnp.array(of_layer, jnp.int32) for of_layer in zip(*map(run.places, range(repeats)), strict=True)]
        if not self.plain or self.unroll > 1:
            return jax.lax.scan(body, carry, (places, xs), reverse=reverse, unroll=self.unroll)

        # Lowering a scan cuts off what its body drops: the forward's functions would no longer be those of the backward.
        def step(state: Any) -> Any:
            done, carry, ys = state
            period = repeats - 1 - done if reverse else done
            carry, y = body(carry, take((places, xs), period))
            return done + 1, carry, put(ys, period, y)

        _, y = jax.eval_shape(body, carry, shapes_of_one((places, xs)))
        ys = jax.tree.map(lambda a: jnp.zeros((repeats, *a.shape), a.dtype), y)
        return jax.lax.while_loop(lambda state: state[0] < repeats, step, (jnp.int32(0), carry, ys))[1:]


def scan_periods(
    run: Run, scan: Scan, blocks: Sequence[Block], x: Array, owns: Sequence[Any], slots: Int[Array, " layers"] | None, states: Array | None
) -> tuple[Array, Array | None, list[Any]]:
    """Scans x through the layers of a run: ``blocks[kind](x, own) -> (x, out)`` gets a layer's part of ``owns[kind]`` [layers, ...].

    The input of each layer is also written to its slot of ``states``; a slot beyond the last is none. Returns (x, states, the outs of each
    kind's layers, stacked).
    """
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    made = [hoisted(block, like, shapes_of_one(own)) for block, own in zip(blocks, owns, strict=True)]
    plan = _Plan(run, scan, tuple(call for call, _ in made))
    slots = None if slots is None else slots.reshape(run.repeats, len(run.kinds))
    return _scan(plan, x, tuple(owns), tuple(over for _, over in made), slots, states)


def _in_turn(*arrays: Any) -> tuple[Any, ...]:
    """The arrays, none before all are there. Of layers that no loop parts, XLA would else decode the weights at once, leave the adapters'
    gradients for later, and find what is computed again to be what was computed first: each into memory of its own."""
    return jax.lax.optimization_barrier(arrays)


def _forward(plan: _Plan, x: Array, owns: Any, consts: Any, slots: Any, states: Any, wanted: Any = None) -> tuple[Any, Any]:
    """((x, states, outs), (what the last layer keeps, for each layer of a period what the layer before it keeps)).

    A layer keeps its input and what `linearise` says; without ``wanted`` nothing.
    """
    run, (how, keep) = plan.run, plan.how(x)

    def layer(kind: int, x: Array, i: Array, own: Any, const: Any, outs: Any) -> tuple[Array, Any, list[Array]]:
        x, turn = _in_turn(x, i)
        one, saved = plan.part(own, i, turn), []
        if wanted is not None and keep:
            (x, out), saved, _ = linearise(plan.blocks[kind], x, one, const, wanted[kind], how, keep=keep)
        else:
            x, out = plan.blocks[kind](x, one, *const)
        return x, put(outs, i, out), saved

    layers = [jax.jit(functools.partial(layer, kind)) for kind in range(len(plan.blocks))]

    def body(carry: Any, each: Any) -> tuple[Any, list[Any]]:
        (x, before, states, outs), (places, slots) = carry, each
        outs, sent = list(outs), []
        for p, (kind, i) in enumerate(zip(run.kinds, places, strict=True)):
            states = states if slots is None else states.at[slots[p]].set(x, mode="drop")
            sent.append(plan.moved(before, jax.memory.Space.Host))
            here, (x, outs[kind], saved) = x, layers[kind](x, i, owns[kind], consts[kind], outs[kind])
            before = None if wanted is None else [here, *saved]
        return (x, before, states, outs), sent

    outs, last = plan.empty_outs(x, owns, consts), run.kinds[-1]
    saved = jax.eval_shape(layers[last], x, jnp.int32(0), owns[last], consts[last], outs[last])[2]
    nothing = None if wanted is None else [x, *(jnp.zeros(a.shape, a.dtype) for a in saved)]
    (x, before, states, outs), sent = plan.loop(body, (x, nothing, states, outs), slots)
    return (x, states, outs), (before, sent)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: _Plan, x: Array, owns: Any, consts: Any, slots: Any, states: Any) -> tuple[Array, Any, Any]:
    return _forward(plan, x, owns, consts, slots, states)[0]


def _scan_fwd(plan: _Plan, x: Any, owns: Any, consts: Any, slots: Any, states: Any) -> tuple[Any, Any]:
    wanted = [(Wanted.of(own), Wanted.of(const)) for own, const in zip(owns, consts, strict=True)]
    x, owns, consts, slots, states = values((x, owns, consts, slots, states))
    result, saved = _forward(plan, x, owns, consts, slots, states, wanted)
    return result, (*saved, owns, consts, slots, wanted)


def _scan_bwd(plan: _Plan, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    last, sent, owns, consts, slots, wanted = residuals
    dx, dstates, douts = jax.tree.map(lambda d: jnp.zeros(d.shape, d.dtype) if is_zero(d) else d, cotangents, is_leaf=is_zero)
    run, (how, keep) = plan.run, plan.how(dx)

    def layer(kind: int, dx: Array, kept: list[Array], i: Array, own: Any, const: Any, dout: Any, sums: Any) -> tuple[Array, Any]:
        downs, dconsts = sums
        dx, turn, (here, *saved), downs = _in_turn(dx, i, kept, downs)
        pull = linearise(plan.blocks[kind], here, plan.part(own, i, turn), const, wanted[kind], how, keep=keep)[2]
        dx, down, dconst = pull((dx, take(dout, i)), saved)
        return dx, (put(downs, turn, down), jax.tree.map(jnp.add, dconsts, dconst))

    layers = [jax.jit(functools.partial(layer, kind)) for kind in range(len(plan.blocks))]

    def body(carry: Any, each: Any) -> tuple[Any, None]:
        (dx, before, sums), (places, (waiting, slots)) = carry, each
        sums = list(sums)
        for p, kind in reversed(list(enumerate(run.kinds))):
            here, before = before, plan.moved(waiting[p], jax.memory.Space.Device)
            dx, sums[kind] = layers[kind](dx, here, places[p], owns[kind], consts[kind], douts[kind], sums[kind])
            if slots is not None:
                dx = dx + dstates.at[slots[p]].get(mode="fill", fill_value=0)
        return (dx, before, sums), None

    of_these = [(o.of_these(own), c.of_these(const)) for (o, c), own, const in zip(wanted, owns, consts, strict=True)]
    (dx, _, sums), _ = plan.loop(body, (dx, last, jax.tree.map(jnp.zeros_like, of_these)), (sent, slots), reverse=True)
    downs = tuple(w.gradient(d, own) for (w, _), (d, _), own in zip(wanted, sums, owns, strict=True))
    dconsts = tuple(w.gradient(d, const) for (_, w), (_, d), const in zip(wanted, sums, consts, strict=True))
    return dx, downs, dconsts, None, None


_scan.defvjp(_scan_fwd, _scan_bwd, symbolic_zeros=True)
