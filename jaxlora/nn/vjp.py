"""What functions need that bring a backward of their own (`jax.custom_vjp` with symbolic zeros)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jaxlora.typing import Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which leaves of a tree need a gradient."""

    flags: tuple[bool, ...]

    @classmethod
    def of(cls, tree: Any) -> "Wanted":
        """Of a tree that a forward rule gets."""
        return cls(tuple(leaf.perturbed for leaf in jax.tree.leaves(tree, is_leaf=is_primal)))

    def of_these(self, tree: Any) -> list[Any]:
        """The leaves that do."""
        return [leaf for leaf, flag in zip(jax.tree.leaves(tree), self.flags, strict=True) if flag]

    def put(self, wanted: Sequence[Any], tree: Any) -> Any:
        """``tree`` with these leaves in their places."""
        leaves, treedef = jax.tree.flatten(tree)
        those = iter(wanted)
        return treedef.unflatten([next(those) if flag else leaf for leaf, flag in zip(leaves, self.flags, strict=True)])

    def gradient(self, wanted: Sequence[Any], tree: Any) -> Any:
        """A tree of cotangents: None where none is needed."""
        treedef, those = jax.tree.structure(tree), iter(wanted)
        return treedef.unflatten([next(those) if flag else None for flag in self.flags])


def hoisted(function: Callable[..., Any], *examples: Any) -> tuple[Callable[..., Any], list[Any]]:
    """(``call``, everything that ``function`` closes over): call(*arguments, *those) is function(*arguments).

    `jax.closure_convert` leaves integers where they are, such as the codes of a weight; inside `jax.checkpoint` they would be lost.

    >>> y = jnp.arange(3)
    >>> call, over = hoisted(lambda x: x + y, jax.ShapeDtypeStruct((3,), jnp.float32))
    >>> call(jnp.ones(3), *over).tolist()
    [1.0, 2.0, 3.0]
    """
    closed, out = jax.make_jaxpr(function, return_shape=True)(*examples)
    treedef = jax.tree.structure(out)

    def call(*arguments: Any) -> Any:
        given, over = arguments[: len(examples)], arguments[len(examples) :]
        return treedef.unflatten(jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, over))(*jax.tree.leaves(given)))

    return call, list(closed.consts)


def linearise(
    block: Callable[..., Any],
    x: Any,
    own: Any,
    const: Sequence[Any],
    wanted: tuple[Wanted, Wanted],
    how: Mapping[str, Any] | None,
    *,
    keep: bool,
) -> tuple[Any, list[Any], Callable[[Any, Sequence[Any]], Any]]:
    """(block(x, own, *const), what to save of it, ``pull(dy, saved)``: the gradients by x and by what is ``wanted`` of own and const).

    ``how`` are arguments of `jax.checkpoint`, or None where it is not used. Without ``keep`` nothing is saved: ``pull`` computes it again.
    """
    mine, theirs = wanted

    def call(x: Any, few: Any, held: Any) -> Any:
        return block(x, mine.put(few, own), *theirs.put(held, const))

    whole = call if how is None else jax.checkpoint(call, **how)
    out, pull = jax.vjp(whole, x, mine.of_these(own), theirs.of_these(const))
    leaves, treedef = jax.tree.flatten(pull)
    # What ``pull`` holds of the arguments are the very same arrays.
    given = {id(leaf) for leaf in jax.tree.leaves((x, own, const))}
    places = [i for i, leaf in enumerate(leaves) if id(leaf) not in given] if keep else []

    def resume(dy: Any, saved: Sequence[Any]) -> Any:
        filled = dict(enumerate(leaves)) | dict(zip(places, saved, strict=True))
        return treedef.unflatten([filled[i] for i in range(len(leaves))])(dy)

    return out, [leaves[i] for i in places], resume


def shapes_of_one(stacked: Any) -> Any:
    """A layer's of arrays [layers, ...], as shapes alone."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), stacked)


def take(stacked: Any, i: Array) -> Any:
    """Layer i's of arrays [layers, ...]."""

    def one(a: Array) -> Array:
        words = a.ndim == 3 and a.dtype == jnp.bfloat16 and a.shape[2] % 2 == 0
        return _take_words(a, i) if words else jax.lax.dynamic_index_in_dim(a, i, keepdims=False, allow_negative_indices=False)

    return jax.tree.map(one, stacked)


@jax.jit
def _take_words(weights: Array, i: Array) -> Array:
    """Layer i's of bf16 weights [layers, O, I]: what copies it by words of two columns then copies them from the stack."""
    words = jax.lax.bitcast_convert_type(weights.reshape(*weights.shape[:2], -1, 2), jnp.uint32)
    taken = jax.lax.dynamic_slice(words, (i, 0, 0), (1, *words.shape[1:]), allow_negative_indices=False)
    return jax.lax.bitcast_convert_type(taken, jnp.bfloat16).reshape(weights.shape[1:])


def unknown_zero() -> Array:
    """0, of which XLA does not know it. Added to a loop's counter it makes kernels read a layer's arrays.

    By the counter alone XLA copies them, asynchronously, in one of four streams that all such copies take in turn: behind a copy that is on
    its way to the host they wait, and with them the device.
    """
    return jax.lax.optimization_barrier(jnp.int32(0))


def scan_with_kernels(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
    """jax.lax.scan(body, carry, xs), with an `unknown_zero` added to its counter."""
    numbers, zero = jnp.arange(len(jax.tree.leaves(xs)[0])), unknown_zero()
    return jax.lax.scan(lambda carry, i: body(carry, take(xs, i + zero)), carry, numbers)


def put(stacked: Any, i: Array, one: Any) -> Any:
    """The arrays [layers, ...] with ``one`` as layer i's."""
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0, allow_negative_indices=False), stacked, one)


def values(tree: Any) -> Any:
    """What a forward rule gets, as the function itself would get it."""
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=is_primal)


def is_primal(leaf: Any) -> bool:
    """Whether a leaf is a value with the word whether it is differentiated."""
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def is_zero(cotangent: Any) -> bool:
    """Whether a cotangent is zero, and not even an array."""
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)
