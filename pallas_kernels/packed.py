"""4-bit weights as kernels get them, and the decoding that everything shares."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8, UInt32

GROUP = 64
# What a nibble means without a code book: two's complement.
_SIGNED = (*range(8), *range(-8, 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight [O, I]: w[o, i] = value(code[o, i]) · scales[o, i // 64].

    With I' = ``width`` rounded up to 64: ``codes`` is uint8 [O, I'/2], byte k holds columns 2k (low nibble) and 2k + 1; ``scales`` is bf16
    or fp32 [O, I'/64]. A code is the number itself (-8…7, int4) or, with a fp32 ``code_book`` of 16, the place of its value (NF4).

    With a ``layer``, int32 [], ``codes`` is a whole stack [layers, O, I'/2], of which that layer's are meant: `float8_weight` and
    `float8_transposed` take such a weight as it is, for everything else it stands ``alone``.
    """

    codes: Any
    scales: Any
    code_book: Any
    width: int = dataclasses.field(metadata={"static": True})
    layer: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), padding excluded."""
        return self.codes.shape[-2], self.width

    @property
    def format(self) -> str:
        """The name that kernels know it by."""
        return "int4" if self.code_book is None else "nf4"

    def alone(self) -> "Packed":
        """With its own codes and no others."""
        if self.layer is None:
            return self
        return dataclasses.replace(self, codes=jax.lax.dynamic_index_in_dim(self.codes, self.layer, keepdims=False), layer=None)

    def columns(self) -> tuple[Float[Array, "O half"], Float[Array, "O half"]]:
        """The even and the odd columns in fp32, padding included."""
        scales = repeat_each(self.scales.astype(jnp.float32), GROUP // 2)
        if self.code_book is not None:
            return self.code_book[self.codes & 15] * scales, self.code_book[self.codes >> 4] * scales
        # Shifting left first moves the sign bit of a nibble to the top.
        nibbles = (jax.lax.shift_left(self.codes, jnp.uint8(4)), self.codes)
        even, odd = (jax.lax.shift_right_arithmetic(n.astype(jnp.int8), jnp.int8(4)) for n in nibbles)
        return even.astype(jnp.float32) * scales, odd.astype(jnp.float32) * scales

    def scales_over(self, scale: Float[Array, ""]) -> Float[Array, "O groups"]:
        """The groups' scales / scale in fp32. The barrier: XLA would otherwise divide for each element."""
        return jax.lax.optimization_barrier(self.scales.astype(jnp.float32) / scale)

    def values(self, codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
        """The values of the low nibbles."""
        nibbles = codes & 15
        return ((nibbles ^ 8).astype(jnp.int8) - 8).astype(jnp.float32) if self.code_book is None else self.code_book[nibbles]


type Weight = Packed | Float[Array, "O I"]


def decode(weight: Weight, dtype: Any) -> Float[Array, "O I"]:
    """The weight as an array, each element rounded once to ``dtype``: a 4-bit number times a bf16 one is exact in fp32."""
    if not isinstance(weight, Packed):
        return weight.astype(dtype)
    return interleave(*weight.columns(), dtype)[:, : weight.width]


def reference_decode(weight: Weight, dtype: Any) -> Float[Array, "O I"]:
    """The definition: nibbles, their values, their scales; rounded to ``dtype``, returned in fp32."""
    if not isinstance(weight, Packed):
        return weight.astype(dtype).astype(jnp.float32)
    nibbles = jnp.stack([weight.codes & 15, weight.codes >> 4], axis=-1).reshape(weight.codes.shape[0], -1)
    values = jnp.array(_SIGNED, jnp.float32) if weight.code_book is None else weight.code_book.astype(jnp.float32)
    scales = jnp.repeat(weight.scales.astype(jnp.float32), GROUP, axis=1)
    return (values[nibbles] * scales)[:, : weight.width].astype(dtype).astype(jnp.float32)


def interleave(even: Float[Array, "O half"], odd: Float[Array, "O half"], dtype: Any) -> Float[Array, "O I"]:
    """Columns even[:, 0], odd[:, 0], even[:, 1], …, rounded to ``dtype``; bf16 by way of 32-bit words."""
    if jnp.dtype(dtype) == jnp.bfloat16:
        return unpair(pair(even, odd))
    return jnp.stack([even, odd], axis=-1).reshape(even.shape[0], -1).astype(dtype)


def pair(even: Float[Array, "O half"], odd: Float[Array, "O half"]) -> UInt32[Array, "O half"]:
    """Two bf16 columns a 32-bit word, the even one in the low half.

    A kernel that writes single 16-bit columns reaches half the memory bandwidth (H200: 1.9 against 3.4 TB/s).
    """
    low, high = (jax.lax.bitcast_convert_type(half.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32) for half in (even, odd))
    return low | (high << 16)


@jax.jit
def pair_columns(x: Float[Array, "O I"]) -> UInt32[Array, "O half"]:
    """The columns of a bf16 array in pairs, as ``pair`` packs them."""
    return jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1, 2), jnp.uint32)


@jax.jit
def unpair(words: UInt32[Array, "O half"]) -> Float[Array, "O I"]:
    """The bf16 columns that ``pair`` packed. The barrier keeps XLA from going back to single columns, or into the product."""
    return jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(words), jnp.bfloat16).reshape(words.shape[0], -1)


def repeat_each(x: Float[Array, "*rows N"], times: int) -> Float[Array, "*rows M"]:
    """Each element of the last axis ``times`` times: a broadcast, where jnp.repeat may build and fold an index array for seconds."""
    return jnp.broadcast_to(x[..., None], (*x.shape, times)).reshape(*x.shape[:-1], x.shape[-1] * times)


def random(draw: Any, shape: tuple[int, int], form: str, dtype: Any) -> Weight:
    """A weight of N(0, 1/I) or so for tests and benchmarks, from a numpy generator; ``form`` is "int4", "nf4" or "dense"."""
    out, width = shape
    if form == "dense":
        return jnp.asarray(draw.standard_normal(shape) * width**-0.5, dtype)
    groups = -(-width // GROUP)
    nibbles = draw.integers(0, 16, (out, groups * GROUP), dtype="uint8")
    # The padding's code is 0.
    nibbles[:, width:] = 0
    codes = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    scales = (0.5 + draw.random((out, groups))) * width**-0.5
    if form == "int4":
        return Packed(jnp.asarray(codes), jnp.asarray(scales / 4.6, jnp.bfloat16), None, width)
    book = jnp.asarray(sorted(draw.standard_normal(16)), jnp.float32)
    return Packed(jnp.asarray(codes), jnp.asarray(scales, jnp.float32), book, width)
