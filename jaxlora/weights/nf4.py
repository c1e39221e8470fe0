"""bitsandbytes' 4-bit blocks: a code book of 16 values, and one fp32 scale a block, itself quantised or not."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from conversion.formats import bnb
from jaxlora.typing import Array, Float, UInt8, UInt32
from jaxlora.weights.base import AbstractWeight, abstract
from pallas_kernels.packed import Packed, interleave, pair, repeat_each

BLOCK, NESTED_BLOCK = 64, 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4(AbstractWeight):
    """w = code_book[code] · absmax[block], blocks running over the row-major weight (Dettmers et al. 2023, arXiv:2305.14314).

    With n = O·I, N = ceil(n / blocksize):
    ``codes`` uint8, two a byte, low nibble first (bitsandbytes stores the high nibble first; conversion swaps them);
    ``code_book`` fp32 [16] (NF4's, FP4's or the file's own);
    single quantisation: ``absmax`` fp32 [N], ``nested`` None; double: ``absmax`` uint8 [N] and ``nested`` = (map fp32 [256],
    absmax fp32 [ceil(N/256)], offset fp32 []), absmax_j = map[u8_j] · nested_absmax[j // 256] + offset.
    Where 64 divides I and the blocksize is 64 the codes are [O, I/2] and absmax [O, I/64]; otherwise both are flat.
    The product is formed in fp32 and rounded once to ``dtype``: bit for bit what bitsandbytes decodes to.
    """

    codes: Any
    absmax: Any
    code_book: Any
    nested: Any
    features: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    blocksize: int = dataclasses.field(default=BLOCK, metadata={"static": True})

    @classmethod
    def abstract(cls, shape: tuple[int, int], dtype: Any, *, double_quant: bool = True, blocksize: int = BLOCK) -> "NF4":
        """An NF4 of that logical shape whose arrays are yet to be loaded."""
        n = shape[0] * shape[1]
        blocks = -(-n // blocksize)
        rows = shape[1] % BLOCK == 0 and blocksize == BLOCK
        codes = (shape[0], shape[1] // 2) if rows else (-(-n // 2),)
        absmax = (shape[0], shape[1] // BLOCK) if rows else (blocks,)
        float32 = jnp.float32
        nested = (
            (abstract((256,), float32), abstract((-(-blocks // NESTED_BLOCK),), float32), abstract((), float32)) if double_quant else None
        )
        return cls(
            abstract(codes, jnp.uint8),
            abstract(absmax, jnp.uint8 if double_quant else float32),
            abstract((16,), float32),
            nested,
            features=shape,
            dtype=jnp.dtype(dtype).name,
            blocksize=blocksize,
        )

    @classmethod
    def quantise(cls, weight: Float[Array, "O I"], dtype: Any = None, *, double_quant: bool = True) -> "NF4":
        """Quantises on the device as bitsandbytes does: absmax of each block of 64, nearest code (ties to the lower).

        >>> NF4.quantise(jnp.ones((2, 64)), double_quant=False).dequantise().sum().item()
        128.0
        """
        codes, absmax = _quantise(weight)
        out, features = weight.shape
        leaf = cls.abstract((out, features), dtype or weight.dtype, double_quant=double_quant)
        nested = None
        if double_quant:
            absmax, nested = _nest(absmax, jnp.asarray(bnb.dynamic_map()))
        arrays = {"codes": codes.reshape(leaf.codes.shape), "absmax": absmax.reshape(leaf.absmax.shape)}
        return dataclasses.replace(leaf, **arrays, code_book=jnp.asarray(bnb.NF4), nested=nested)

    @classmethod
    def from_stored(cls, stored: bnb.QuantizedTensor) -> "NF4":
        """The leaf of a tensor that bitsandbytes wrote (nf4 or fp4), on the default device.

        Raises:
          NotImplementedError: its scales are quantised in blocks other than 256.
        """
        leaf = cls.abstract_like(stored.structure)
        nested = stored.nested
        parts = None if nested is None else (jnp.asarray(nested.code_book), jnp.asarray(nested.absmax), jnp.float32(nested.offset))
        absmax = stored.absmax if nested is None else nested.codes
        arrays = {"codes": jnp.asarray(stored.codes.reshape(leaf.codes.shape)), "absmax": jnp.asarray(absmax.reshape(leaf.absmax.shape))}
        return dataclasses.replace(leaf, **arrays, code_book=jnp.asarray(stored.code_book), nested=parts)

    @classmethod
    def abstract_like(cls, stored: bnb.Structure) -> "NF4":
        """The structure that ``from_stored`` gives, before any of its arrays is read."""
        if stored.nested_blocksize not in (None, NESTED_BLOCK):
            raise NotImplementedError(f"nested scales in blocks of {stored.nested_blocksize} are not modelled, only {NESTED_BLOCK}")
        out, features = stored.shape
        return cls.abstract((out, features), stored.dtype, double_quant=stored.nested_blocksize is not None, blocksize=stored.blocksize)

    @property
    def shape(self) -> tuple[int, int]:
        """The logical (out, in)."""
        return self.features

    @property
    def trainable(self) -> bool:
        """Codes have no gradient."""
        return False

    @property
    def in_rows(self) -> bool:
        """Whether blocks end at row ends, so that codes and scales are two-dimensional and kernels can run."""
        return self.features[1] % BLOCK == 0 and self.blocksize == BLOCK

    def dequantise(self) -> Float[Array, "O I"]:
        """code_book[code] · absmax, rounded once to ``dtype``."""
        if self.in_rows:
            return interleave(*self._in_rows().columns(), self.dtype)
        out, features = self.features
        n = out * features
        values = jnp.stack(self._halves(), axis=-1).reshape(-1)[:n]
        scales = repeat_each(self._scales(), self.blocksize)
        return (values * scales[:n]).reshape(out, features).astype(self.dtype)

    def largest(self) -> Float[Array, "*layers"]:
        """max|code_book| · max|absmax|."""
        if self.codes.ndim > (2 if self.in_rows else 1):
            return jax.vmap(lambda leaf: leaf.largest())(self)
        return jnp.max(jnp.abs(self.code_book)) * jnp.max(jnp.abs(self._scales()))

    def cotangent(self, x: Float[Array, "N I"], dy: Float[Array, "N O"]) -> None:
        """None: packed codes are never trained."""

    @property
    def code_rows(self) -> UInt8[Array, "*layers O half"] | None:
        """All codes, where blocks end at row ends."""
        return self.codes if self.in_rows else None

    def words(self) -> UInt32[Array, "O half"] | None:
        """Two bf16 columns a word, where blocks end at row ends."""
        return pair(*self._in_rows().columns()) if self.dtype == "bfloat16" and self.in_rows else None

    def packed(self) -> Packed | None:
        """The codes and scales, where blocks end at row ends."""
        return self._in_rows() if self.in_rows else None

    def _in_rows(self) -> Packed:
        return Packed(self.codes, self._scales(), self.code_book, self.features[1])

    def _halves(self) -> tuple[Array, Array]:
        return self.code_book[self.codes & 15], self.code_book[self.codes >> 4]

    def _scales(self) -> Array:
        if self.nested is None:
            return self.absmax
        table, nested_absmax, offset = self.nested
        outer = repeat_each(nested_absmax, NESTED_BLOCK)
        product = table[self.absmax] * outer[: self.absmax.size].reshape(self.absmax.shape)
        # bitsandbytes rounds the product before it adds: the barrier keeps XLA from fusing both into one fma.
        return jax.lax.optimization_barrier(product) + offset


@jax.jit
def _quantise(weight: Float[Array, "O I"]) -> tuple[UInt8[Array, " half"], Float[Array, " blocks"]]:
    flat = weight.astype(jnp.float32).reshape(-1)
    n = flat.size
    blocks = jnp.pad(flat, (0, -n % BLOCK)).reshape(-1, BLOCK)
    absmax = jnp.abs(blocks).max(axis=1)
    scaled = blocks / jnp.where(absmax == 0, 1, absmax)[:, None]
    midpoints = (bnb.NF4[1:] + bnb.NF4[:-1]) / 2
    codes = sum((scaled > midpoint).astype(jnp.uint8) for midpoint in midpoints)
    # The last byte's unused nibble holds code 0, as bitsandbytes' padding does.
    codes = jnp.pad(jnp.asarray(codes).reshape(-1)[:n], (0, n % 2))
    return codes[0::2] | (codes[1::2] << 4), absmax


@jax.jit
def _nest(absmax: Float[Array, " blocks"], table: Float[Array, "256"]) -> tuple[UInt8[Array, " blocks"], tuple[Array, Array, Array]]:
    offset = absmax.mean()
    centred = jnp.pad(absmax - offset, (0, -absmax.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    scale = jnp.abs(centred).max(axis=1)
    scaled = (centred / jnp.where(scale == 0, 1, scale)[:, None]).reshape(-1)[: absmax.size]
    codes = jnp.searchsorted((table[1:] + table[:-1]) / 2, scaled, side="left").astype(jnp.uint8)
    return codes, (table, scale, offset)
