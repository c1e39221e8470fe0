"""What every storage format of a Linear's weight can do."""

import abc
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.typing import Array, Float, UInt8, UInt32
from pallas_kernels.adapted_sum import adapted_sum
from pallas_kernels.packed import Weight, pair, pair_columns, unpair

type LowRank = tuple[Array, Array]

# Columns by which a product of thousands may grow for nothing: the last tile of 128 is hardly used.
_FEW = 64


class AbstractWeight(abc.ABC):
    """A weight [O, I] in some storage format; a pytree of arrays with static metadata. Subclasses are final.

    Invariants, where ``decoded``: ``w.matmul(x) == x @ w.dequantise().T`` and ``w.matmul_t(dy) == dy @ w.dequantise()``, up to the
    rounding of the product.
    A leaf whose arrays carry one more leading axis is a stack of weights; it is sliced before it multiplies.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """The logical (out, in), whatever is stored."""

    @property
    @abc.abstractmethod
    def trainable(self) -> bool:
        """Whether a gradient with respect to the stored arrays exists."""

    @abc.abstractmethod
    def dequantise(self) -> Float[Array, "O I"]:
        """The weight as one array in the dtype that the format decodes to."""

    @abc.abstractmethod
    def cotangent(self, x: Float[Array, "N I"], dy: Float[Array, "N O"]) -> "AbstractWeight | None":
        """The gradient of ``sum(dy * matmul(x))`` as a leaf of the same structure; None where ``trainable`` is False."""

    @property
    def decoded(self) -> bool:
        """Whether its products are those of the decoded array, up to the rounding of the product."""
        return True

    @property
    def in_place(self) -> bool:
        """Whether products read it where it is, so that to put anything beside it costs a copy."""
        return False

    @abc.abstractmethod
    def largest(self) -> Float[Array, "*layers"]:
        """A bound of the magnitudes of the weight (of each layer, in a stack), in fp32: reached, or nearly so."""

    def packed(self) -> Weight | None:
        """The weight as kernels take it; None where none takes it."""
        return None

    @property
    def code_rows(self) -> UInt8[Array, "*layers O half"] | None:
        """The codes that ``packed`` has, of a whole stack too; None where it has none."""
        return None

    def words(self) -> UInt32[Array, "O half"] | None:
        """The decoded weight's bf16 columns in pairs, as `pair` packs them; None where this leaf is not decoded so."""
        return None

    def above(self, others: Sequence["AbstractWeight"]) -> "AbstractWeight | None":
        """One leaf that stores this weight and, below it, the others; None where the format cannot say that."""
        return None

    def numbered(self, *, known: bool = False) -> "AbstractWeight":
        """This stack, with whatever its layers need to find themselves in it; ``known``: XLA will know each one's number."""
        return self

    def within(self, stack: "AbstractWeight") -> "AbstractWeight":
        """This layer of a ``numbered`` stack, with whatever its products would rather find there."""
        return self

    def joins(self, others: Sequence["AbstractWeight"]) -> bool:
        """Whether ``matmul_t_apart`` has one product of this weight and the others."""
        return False

    def matmul(self, x: Float[Array, "N I"], update: LowRank | None = None) -> Float[Array, "N O"]:
        """x @ Wᵀ, plus u @ bᵀ where an update (u [N, R], b [O, R]) is given; in x's dtype. A format may fuse the two."""
        if update is None:
            return contract_last(x, self.dequantise().astype(x.dtype))
        u, b = update
        if self.shape[0] >= self.shape[1] and one_product(x.shape[1], u.shape[1]):
            return product_beside((self,), padded_beside(x, u), b)
        return contract_last(x, self.dequantise().astype(x.dtype)) + contract_last(u, b)

    def matmul_t(self, dy: Float[Array, "N O"], update: LowRank | None = None) -> Float[Array, "N I"]:
        """dy @ W, plus u @ a where an update (u [N, R], a [R, I]) is given; in dy's dtype. This is the input's gradient."""
        if update is not None and self.shape[1] >= self.shape[0] and one_product(dy.shape[1], update[0].shape[1]):
            return gradient_beside((self,), padded_beside(dy, update[0]), update[1])
        dx = contract_first(dy, stacked((self,), dy.dtype))
        return dx if update is None else dx + contract_first(*update)

    def matmul_apart(self, x: Float[Array, "N I"]) -> tuple[Float[Array, "N O"], Float[Array, " N"]] | None:
        """(z, s) of x @ Wᵀ = s ∘ z, s being fp32 scales of the rows; None where products come without any."""
        return None

    def matmul_t_apart(
        self, dys: Sequence[Float[Array, "N _"]], others: Sequence["AbstractWeight"] = ()
    ) -> tuple[Float[Array, "N I"], Float[Array, " N"]] | None:
        """(z, s) of Σ dy_i @ W_i = s ∘ z, as of ``matmul_apart``, for this weight and ``others`` that it joins."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays, stacked axis included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def is_weight(leaf: Any) -> bool:
    """Whether this is a weight, which is a leaf of a model and a tree of arrays."""
    return isinstance(leaf, AbstractWeight)


def join(weights: Sequence[AbstractWeight], width: int, columns: int) -> bool:
    """Whether the products of one x are better made as one: outputs not much wider than x, of weights that are decoded in one pass."""
    narrow, decoded = sum(w.shape[0] for w in weights) <= 2 * width, all(w.decoded for w in weights)
    if not (narrow and decoded and one_product(width, columns)):
        return False
    return all(w.words() is not None for w in weights) or weights[0].above(weights[1:]) is not None


def product_beside(weights: Sequence[AbstractWeight], both: Float[Array, "N C"], b: Float[Array, "O R"]) -> Float[Array, "N O"]:
    """The products x @ W_iᵀ side by side, plus u @ bᵀ of an update, for both = [x, u, 0]; O is all the weights' outputs."""
    spare = both.shape[1] - weights[0].shape[1] - b.shape[1]
    return contract_last(both, stacked(weights, both.dtype, right=jnp.pad(b, ((0, 0), (0, spare)))))


def gradient_beside(weights: Sequence[AbstractWeight], both: Float[Array, "N C"], a: Float[Array, "R I"]) -> Float[Array, "N I"]:
    """Σ dy_i @ W_i, plus u @ a of an update, for both = [dy_1, …, u, 0]."""
    spare = both.shape[1] - sum(w.shape[0] for w in weights) - len(a)
    return contract_first(both, stacked(weights, both.dtype, below=jnp.pad(a, ((0, spare), (0, 0)))))


def input_gradient(
    weights: Sequence[AbstractWeight], dys: Sequence[Float[Array, "N _"]], update: LowRank | None = None
) -> Float[Array, "N I"]:
    """Σ dy_i @ W_i, plus u @ a where an update (u [N, R], a [R, I]) is given: the gradient of the input that the weights share.

    Where the outputs are not much wider than the input, they are one product: copying the dy costs less than adding up the dx.
    """
    apart = weights[0].matmul_t_apart(dys, weights[1:]) if weights[0].joins(weights[1:]) else None
    if apart is not None:
        return scale_rows(*apart) if update is None else adapted_sum(*apart, update[0], update[1].T)
    if goes_together(weights, 0 if update is None else update[0].shape[1]):
        if update is None:
            return contract_first(beside(*dys), stacked(weights, dys[0].dtype))
        return gradient_beside(weights, padded_beside(*dys, update[0]), update[1])
    dx = weights[0].matmul_t(dys[0], update)
    for w, dy in zip(weights[1:], dys[1:], strict=True):
        # In this order XLA has the second product add to the first in place.
        dx = w.matmul_t(dy) + dx
    return dx


def scale_rows(z: Float[Array, "N C"], scales: Float[Array, " N"]) -> Float[Array, "N C"]:
    """scales_i · z_i, in fp32 and rounded once."""
    return (z.astype(jnp.float32) * scales[:, None]).astype(z.dtype)


def gradients_beside(
    dys: Sequence[Float[Array, "N _"]], weights: Sequence[AbstractWeight], columns: Sequence[Float[Array, "_ R"]]
) -> tuple[Float[Array, "N C"], Float[Array, "N R"]]:
    """([Σ dy_i @ W_i, du, 0], du = Σ dy_i @ b_i) for columns b_i [O_i, R]: one product for each wide dy, which is read once.

    [W_i, b_i, 0] is what ``matmul`` decodes for an update, so that a block that is recomputed beside its backward decodes it once.
    """
    width, rank = weights[0].shape[1], columns[0].shape[1]
    columns = [jnp.pad(b, ((0, 0), (0, padding(width, rank)))) for b in columns]
    parts = [contract_first(dy, stacked((w,), dy.dtype, right=b)) for dy, w, b in zip(dys, weights, columns, strict=True)]
    # In this order XLA has each product add to those before it in place.
    both = functools.reduce(lambda total, part: part + total, parts)
    return both, both[:, width : width + rank]


def gradients_together(
    dys: Float[Array, "N C"],
    weights: Sequence[AbstractWeight],
    columns: Sequence[Float[Array, "_ R"]],
    rows: Float[Array, "R I"],
) -> tuple[Float[Array, "N I"], Float[Array, "N R"], Float[Array, "N C"]]:
    """(Σ dy_i @ W_i + du @ rows, du, [dy_1, …, du, 0]), du = Σ dy_i @ b_i for columns b_i [O_i, R]: one product of one array.

    ``dys`` are [dy_1, …, 0], with `room_beside` them; du is put there.
    """
    width, rank = sum(w.shape[0] for w in weights), rows.shape[0]
    du = contract_first(dys, jnp.concatenate([*columns, jnp.zeros((dys.shape[1] - width, rank), dys.dtype)]))
    both = jax.lax.dynamic_update_slice(dys, du, (0, width))
    return gradient_beside(weights, both, rows), du, both


def put_together(dys: Sequence[Float[Array, "N _"]], weights: Sequence[AbstractWeight], columns: int) -> Float[Array, "N C"]:
    """[dy_1, …, 0] for `gradients_together` of so many columns; what makes the dys writes them there."""
    return beside(*dys, jnp.zeros((len(dys[0]), room_beside(weights, columns)), dys[0].dtype), made=True)


def room_beside(weights: Sequence[AbstractWeight], columns: int) -> int:
    """Columns of zeros behind the gradients by the outputs of these weights, for that many of their own and what makes products faster."""
    return columns + padding(sum(w.shape[0] for w in weights), columns)


def goes_together(weights: Sequence[AbstractWeight], columns: int) -> bool:
    """Whether the gradients by the outputs of these weights, and so many more columns, are copied into one array for one product."""
    fit = all(w.decoded and one_product(w.shape[0], columns) for w in weights)
    return len(weights) > 1 and _narrow(weights) and fit


def _narrow(weights: Sequence[AbstractWeight]) -> bool:
    """Whether their outputs are not much wider than their input."""
    return sum(w.shape[0] for w in weights) <= 2 * weights[0].shape[1]


def goes_beside(weights: Sequence[AbstractWeight], columns: int) -> bool:
    """Whether so many more columns of the products dy_i @ W_i cost less than reading dys once more that are much wider than the input."""
    fit = columns <= _FEW and all(w.decoded and one_product(w.shape[0], columns) for w in weights)
    return fit and not _narrow(weights) and not stay_in_place(weights)


def stay_in_place(weights: Sequence[AbstractWeight]) -> bool:
    """Whether adapters are better added apart from the gradients dy_i @ W_i, whose copies would be much larger than their sum."""
    return not _narrow(weights) and all(w.in_place for w in weights)


@functools.partial(jax.jit, static_argnames="dtype")
def stacked(
    weights: Sequence[AbstractWeight], dtype: Any, *, right: Float[Array, "O R"] | None = None, below: Float[Array, "R I"] | None = None
) -> Float[Array, "rows columns"]:
    """The decoded weights on top of each other, with more columns to the right or more rows below, written in one pass."""
    words = [w.words() if jnp.dtype(dtype) == jnp.bfloat16 else None for w in weights]
    paired = [part for part in words if part is not None]
    if len(paired) == len(weights):
        parts, pack, unpack = paired, pair_columns, unpair
    else:
        # One decoding of joined codes, where the format can say that; the barrier: XLA would decode again in every tile of the product.
        joined = weights[0].above(weights[1:]) if len(weights) > 1 else None
        parts = [w.dequantise().astype(dtype) for w in (weights if joined is None else (joined,))]
        pack, unpack = lambda x: x, jax.lax.optimization_barrier
    if right is not None:
        beyond, starts = pack(right.astype(dtype)), itertools.accumulate(map(len, parts), initial=0)
        # Rows last: parts on top of each other XLA writes without a branch for each element.
        parts = [jnp.concatenate([part, beyond[at : at + len(part)]], axis=1) for part, at in zip(parts, starts, strict=False)]
    if below is not None:
        parts.append(pack(below.astype(dtype)))
    return unpack(parts[0] if len(parts) == 1 else jnp.concatenate(parts))


def beside(*parts: Float[Array, "N _"], made: bool = False) -> Float[Array, "N C"]:
    """The parts' columns side by side; bf16 by way of 32-bit words, which are copied at twice the speed of single columns.

    What makes the parts may join the copy where they are ``made`` for it alone; that does not pay where they are there already.
    """
    if any(part.dtype != jnp.bfloat16 or part.shape[1] % 2 for part in parts):
        return jnp.concatenate(parts, axis=1)
    # XLA fuses nothing across a bitcast to another width.
    words = [pair(part[:, 0::2], part[:, 1::2]) if made else pair_columns(part) for part in parts]
    return unpair(jnp.concatenate(words, axis=1))


def padded_beside(*parts: Float[Array, "N _"]) -> Float[Array, "N C"]:
    """`beside`, with columns of zeros behind the last part that make products faster."""
    *wide, last = (part.shape[1] for part in parts)
    spare = padding(sum(wide), last)
    return beside(*parts, *([jnp.zeros((len(parts[0]), spare), parts[0].dtype)] if spare else []))


def padding(width: int, columns: int) -> int:
    """Columns of zeros behind an array of that width and so many columns more. Whole 128 bytes a row are worth it to cuBLAS's products:
    on an H200 14,352 contracted columns of bf16 take 1,483 us, 14,400 take 1,446 and 14,336 take 1,440."""
    return -(width + columns) % 64


def contract_last(x: Float[Array, "N I"], w: Float[Array, "O I"]) -> Float[Array, "N O"]:
    """x @ wᵀ: both operands contracted on their last axis."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def contract_first(dy: Float[Array, "N O"], w: Float[Array, "O I"]) -> Float[Array, "N I"]:
    """dy @ w."""
    return jax.lax.dot_general(dy, w, (((1,), (0,)), ((), ())))


def outer(dy: Float[Array, "N O"], x: Float[Array, "N I"]) -> Float[Array, "O I"]:
    """dyᵀ @ x, accumulated and returned in fp32."""
    return jax.lax.dot_general(dy, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def one_product(width: int, columns: int) -> bool:
    """Whether so many more columns join an array of that width: on a GPU, copying a narrow x costs less than writing and reading a wide
    update.

    Not on a CPU, where it only changes the order of the sum, nor at ranks that leave no aligned rows.
    """
    return jax.default_backend() == "gpu" and columns % 16 == 0 and width % 16 == 0


def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array that is yet to be loaded."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
