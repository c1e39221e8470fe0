"""Layers, stacked and scanned; and the one door between stacked trees and paths.

A block's structure is its static attributes and the shapes of its leaves: which Linears, in which format, with which adapter rank.
Layers of equal structure are stacked on axis 0 and scanned; a pattern of structures (one full-attention layer after five sliding ones)
is scanned by its shortest repeating period, the layers of each structure in one stack.
"""

import itertools
import logging
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlora.errors import raise_all
from jaxlora.nn.linear import Linear, making_inputs
from jaxlora.nn.offload import scan_offloaded
from jaxlora.nn.scan import Block, Run, Scan, scan_periods
from jaxlora.select import expand, layers_of
from jaxlora.typing import Array, PRNGKeyArray
from jaxlora.weights.base import AbstractWeight, is_weight

log = logging.getLogger(__name__)

MANY_RUNS = 8
_KEPT = Scan()


def layout(structures: Sequence[Hashable]) -> tuple[Run, ...]:
    """Covers the layers by runs of repeating periods: at each layer the one that covers most, of these the shortest period.

    >>> layout("aaaa")
    (Run(start=0, kinds=(0,), repeats=4),)
    >>> layout("aabaabaa")
    (Run(start=0, kinds=(0, 0, 1), repeats=2), Run(start=6, kinds=(0,), repeats=2))
    """
    runs, at, n = [], 0, len(structures)
    while at < n:
        best, most = 1, 1
        for period in range(1, (n - at) // 2 + 1):
            repeats = 1
            while all(
                structures[at + repeats * period + i : at + repeats * period + i + 1] == structures[at + i : at + i + 1]
                for i in range(period)
            ):
                repeats += 1
            if repeats > 1 and period * repeats > best * most:
                best, most = period, repeats
        numbers = {structure: kind for kind, structure in enumerate(dict.fromkeys(structures[at : at + best]))}
        runs.append(Run(at, tuple(numbers[structure] for structure in structures[at : at + best]), most))
        at = runs[-1].stop
    return tuple(runs)


class Stack(nnx.Module):
    """``len(blocks)`` layers; attribute ``start,…:stop:step`` holds the layers of that range, their leaves stacked on axis 0 in order.

    A block is called ``block(x, shared, per_layer) -> (x, out)``; ``path`` is the stack's own path in the model.
    """

    def __init__(self, blocks: Sequence[nnx.Module], *, path: str):
        self.path = path
        self.depth = len(blocks)
        self.runs = layout([structure(block) for block in blocks])
        for key in self.keys:
            graphdef, states = _split_all([blocks[i] for i in layers_of(key)])
            setattr(self, key, nnx.merge(graphdef, jax.tree.map(lambda *leaves: _stack_leaves(leaves), *states)))
        if len(self.runs) > MANY_RUNS:
            log.warning(
                "%s splits into %d runs, each compiled on its own; they begin at layers %s",
                path,
                len(self.runs),
                [r.start for r in self.runs],
            )

    def __call__(
        self,
        x: Array,
        shared: Any = None,
        per_layer: Any = None,
        *,
        collect: Sequence[int] = (),
        scan: Scan = _KEPT,
    ) -> tuple[Array, list[Array], Any]:
        """Runs the layers in order; returns (x, collected, per_layer_out).

        ``shared`` is closed over; ``per_layer`` is a pytree whose leaves have a leading layer axis, or, where layers differ in what they
        get, a dict of one pytree for each of ``keys`` (and per_layer_out is such a dict). ``collect`` names layers whose *input* is
        returned (index ``depth``: the output).
        """
        inputs: dict[int, Array] = {}
        outs: list[tuple[list[int], Any]] = []
        for run in self.runs:
            wanted = sorted({i for i in collect if run.start <= i < run.stop})
            x, states, run_outs = self._run(run, x, shared, per_layer, wanted, scan)
            outs += [(layers_of(key), out) for key, out in zip(run.keys, run_outs, strict=True)]
            inputs.update({layer: states[i] for i, layer in enumerate(wanted)})
        if self.depth in collect:
            inputs[self.depth] = x
        by_key = dict(zip(self.keys, (out for _, out in outs), strict=True))
        return x, [inputs[i] for i in collect], by_key if isinstance(per_layer, dict) else _in_layer_order(outs)

    @property
    def keys(self) -> list[str]:
        """``start,…:stop:step`` of each set of layers that are stacked together."""
        return list(itertools.chain.from_iterable(run.keys for run in self.runs))

    def _run(self, run: Run, x: Array, shared: Any, per_layer: Any, wanted: Sequence[int], scan: Scan) -> tuple[Array, Any, list[Any]]:
        """(x, the inputs of the ``wanted`` layers on a first axis, what the layers of each kind returned)."""
        splits = [nnx.split(getattr(self, key)) for key in run.keys]
        known = scan.in_place and len(run.keys) == 1 and run.repeats > 1
        stacks = [_each_weight(lambda stack: stack.numbered(known=known), state) for _, state in splits]
        owns = [(stack, _of_layers(per_layer, key)) for stack, key in zip(stacks, run.keys, strict=True)]

        def of_kind(graphdef: Any, stack: Any) -> Block:
            def block(x: Array, own: Any) -> tuple[Array, Any]:
                state, extra = own
                state = _each_weight(lambda one, stacked: one.within(stacked), state, stack)
                with making_inputs(scan.remat is not None):
                    x, out = nnx.merge(graphdef, state)(x, shared, extra)
                return x, None if scan.offload else out

            return block

        # No gradient goes by way of the whole stack.
        wholes = jax.lax.stop_gradient(stacks) if known else stacks
        blocks = [of_kind(graphdef, whole) for (graphdef, _), whole in zip(splits, wholes, strict=True)]
        # The states are carried, so that only those that are wanted are held; all others have a slot beyond the last.
        slots = jnp.array([(*wanted, i).index(i) for i in range(run.start, run.stop)]) if wanted else None
        states = jnp.zeros((len(wanted), *x.shape), x.dtype) if wanted else None
        if len(blocks) > 1 or scan.unroll != 1:
            return scan_periods(run, scan, blocks, x, owns, slots, states)
        (block,), (own,) = blocks, owns
        if scan.offload:
            return *scan_offloaded(block, x, own, slots, states), [None]
        whole = jax.checkpoint(block, policy=scan.policy, prevent_cse=False) if scan.checkpoint else block

        def body(carry: Any, each: Any) -> Any:
            (x, states), (own, slot) = carry, each
            states = states.at[slot].set(x, mode="drop") if wanted else states
            x, out = whole(x, own)
            return (x, states), out

        (x, states), out = jax.lax.scan(body, (x, states), (own, slots))
        return x, states, [out]

    def regroup(self, edit: Callable[[int, nnx.Module], None]) -> "Stack":
        """Returns the stack after ``edit(layer, block)`` changed each layer's structure, its arrays moved into the new runs.

        ``edit`` sees a block of abstract leaves; what it adds stays abstract, to be filled by the caller. Nothing is copied where the runs
        stay as they are; elsewhere a leaf is moved at a time, and this stack is emptied so that its arrays are freed as they move.
        """
        blocks = [self._abstract_block(i) for i in range(self.depth)]
        for i, block in enumerate(blocks):
            edit(i, block)
        new = Stack(blocks, path=self.path)
        old = flatten_leaves(nnx.to_pure_dict(nnx.state(self)))
        for key in self.keys:
            delattr(self, key)
        filled = nnx.to_pure_dict(nnx.state(new))
        where = {path: (stacked, i) for stacked in old for i, path in enumerate(expand(stacked))}
        left = {stacked: len(expand(stacked)) for stacked in old}
        for stacked, leaf in flatten_leaves(filled).items():
            paths = expand(stacked)
            sources = [where[path] for path in paths if path in where]
            if len(sources) < len(paths) or jax.tree.structure(leaf) != jax.tree.structure(old[sources[0][0]]):
                continue
            if stacked in old:
                _put(filled, stacked, old[stacked])
            else:
                moved = jax.tree.map(lambda *a: _stack_leaves(a), *[jax.tree.map(lambda a, i=i: _take(a, i), old[s]) for s, i in sources])
                _put(filled, stacked, moved)
            for source, _ in sources:
                left[source] -= 1
                if not left[source]:
                    del old[source]
        nnx.update(new, filled)
        return new

    def dropout_keys(self, key: PRNGKeyArray) -> dict[str, Any] | None:
        """One key a layer for each Linear that drops, by the Linear's last name: fold_in(key, crc32(HF path)); None if none drops."""
        keys: dict[str, dict[str, Any]] = {}
        for stacked, linear in linears(self).items():
            if linear.lora is not None and linear.lora_dropout:
                for path in expand(f"{self.path}.{stacked}"):
                    layer = path.removeprefix(f"{self.path}.").split(".")[0]
                    keys.setdefault(path.rpartition(".")[2], {})[layer] = fold_path(key, path)
        if not keys:
            return None
        # A layer whose Linear has no adapter never uses its key.
        return {name: jnp.stack([found.get(str(i), key) for i in range(self.depth)]) for name, found in keys.items()}

    def _abstract_block(self, layer: int) -> nnx.Module:
        key = next(k for k in self.keys if layer in layers_of(k))
        graphdef, state = nnx.split(getattr(self, key))
        return nnx.merge(graphdef, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), state))


def fold_path(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """The key of what ``path`` names: a draw depends on its meaning, never on its position in a stack."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def structure(block: nnx.Module) -> Hashable:
    """What must agree for layers to be scanned together."""
    graphdef, state = nnx.split(block)
    leaves, treedef = jax.tree.flatten(state)
    return graphdef, treedef, tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves)


def linears(module: nnx.Module) -> dict[str, Linear]:
    """Every Linear by its (stacked) path."""
    return {".".join(map(str, path)): node for path, node in nnx.iter_graph(module) if isinstance(node, Linear)}


def layers_alike(module: nnx.Module) -> bool:
    """Whether all layers of each stack are of one structure, and several: compiled by themselves, none of them is in a loop."""
    stacks = [node for _, node in nnx.iter_graph(module) if isinstance(node, Stack)]
    return all(len(run.keys) == 1 and run.repeats > 1 for stack in stacks for run in stack.runs)


def linear_paths(module: nnx.Module) -> list[str]:
    """The Hugging Face path of every Linear, layers expanded, in layer order."""
    return sorted((path for stacked in linears(module) for path in expand(stacked)), key=_natural)


def edit_linears(model: nnx.Module, edit: Callable[[str, Linear], None]) -> None:
    """Calls ``edit(path, linear)`` on every Linear, regrouping stacks by what it changed; new leaves stay abstract."""
    stacks = {".".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, Stack)}
    for path, stack in stacks.items():

        def edit_block(layer: int, block: nnx.Module, path: str = path) -> None:
            for inner, linear in linears(block).items():
                edit(f"{path}.{layer}.{inner}", linear)

        *parents, name = path.split(".")
        owner = model
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, stack.regroup(edit_block))
    for path, linear in linears(model).items():
        if not any(path.startswith(f"{stack}.") for stack in stacks):
            edit(path, linear)


def flatten_leaves(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as {stacked path: leaf}; a weight is one leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten_leaves(value, path))
        else:
            flat[path] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten_leaves``."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        _put(tree, path, value, create=True)
    return tree


def iter_layers(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (path, leaf of one layer) lazily: slices a stacked leaf only when it is reached."""
    for stacked, leaf in flatten_leaves(tree).items():
        paths = expand(stacked)
        if paths == [stacked]:
            yield stacked, leaf
        else:
            for i, path in enumerate(paths):
                yield path, jax.tree.map(lambda a, i=i: _take(a, i), leaf)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Stacked trees to paths: ``{"…layers.3.self_attn.q_proj.lora_A": array}``; a weight is one leaf."""
    return dict(iter_layers(tree))


def unflatten(flat: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Paths to a stacked tree of ``like``'s structure.

    Raises:
      ValueError: lists every path that is missing, too many, or of another shape.
    """
    leaves, faults, used = {}, [], set()
    for stacked, leaf in flatten_leaves(like).items():
        paths = expand(stacked)
        used.update(paths)
        missing = [path for path in paths if path not in flat]
        faults += [f"{path}: missing" for path in missing]
        if missing:
            continue
        parts = [flat[path] for path in paths]
        built = parts[0] if paths == [stacked] else jax.tree.map(lambda *a: _stack_leaves(a), *parts)
        shapes = [(jnp.shape(a), jnp.shape(b)) for a, b in zip(jax.tree.leaves(built), jax.tree.leaves(leaf), strict=True)]
        faults += [f"{stacked}: shape {got}, expected {want}" for got, want in shapes if got != want]
        leaves[stacked] = built
    faults += [f"{path}: belongs nowhere" for path in flat if path not in used]
    raise_all("these leaves do not fit the model", faults)
    return nest(leaves)


def _put(tree: dict[Any, Any], path: str, value: Any, *, create: bool = False) -> None:
    # nnx keeps the members of a list under integer keys.
    *parents, last = (int(s) if s.isdigit() else s for s in path.split("."))
    for key in parents:
        tree = tree.setdefault(key, {}) if create else tree[key]
    tree[last] = value


def _split_all(blocks: Sequence[nnx.Module]) -> tuple[Any, list[Any]]:
    splits = [nnx.split(block) for block in blocks]
    return splits[0][0], [state for _, state in splits]


def _stack_leaves(leaves: Sequence[Any]) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)


def _take(leaf: Any, i: int) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf[i]


def _of_layers(per_layer: Any, key: str) -> Any:
    """What the layers of a key get."""
    if isinstance(per_layer, dict):
        return per_layer[key]
    starts, stop, step = key.split(":")
    at = np.array(layers_of(key)) if "," in starts else slice(int(starts), int(stop), int(step))
    return jax.tree.map(lambda a: a[at], per_layer)


def _each_weight(function: Callable[..., AbstractWeight], *trees: Any) -> Any:
    """The first tree, with function(weight, the weights in its place in the other trees) for its weights."""
    return jax.tree.map(lambda *at: function(*at) if is_weight(at[0]) else at[0], *trees, is_leaf=is_weight)


def _in_layer_order(outs: list[tuple[list[int], Any]]) -> Any:
    if not jax.tree.leaves([out for _, out in outs]):
        return None
    if len(outs) == 1:
        return outs[0][1]
    order = list(itertools.chain.from_iterable(layers for layers, _ in outs))
    inverse = jnp.asarray(sorted(range(len(order)), key=order.__getitem__))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[inverse], *[out for _, out in outs])


def _natural(path: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(s), "") if s.isdigit() else (-1, s) for s in path.split("."))
