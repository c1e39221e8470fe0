"""A frozen weight whose products run in e4m3 on the tensor cores of sm89 and up: twice the arithmetic of bf16, for 3 more bits of noise."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.typing import Array, Float
from jaxlora.weights.base import AbstractWeight, LowRank, contract_first, contract_last, scale_rows
from pallas_kernels.float8_rows import LARGEST, float8_rows

# A kernel that rounds rows keeps them in registers: rows of more columns are rounded apart, each weight's under scales of their own.
_WIDEST = 32768


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Float8(AbstractWeight):
    """The weight ``base`` as W₈ = e4m3(w / scale), multiplied by rows of x (or dy) as e4m3(x_i / s_i): y_i = scale · s_i · x₈ W₈ᵀ.

    ``scale`` is fp32 [] for the whole weight, s_i = max|x_i| / 448 for each row (Micikevicius et al. 2022, arXiv:2209.05433). One scale
    does for all groups of a 4-bit weight, since e4m3 is a floating-point format: groups would have to differ by 2¹¹ to lose a bit. A code
    times its group's scale is rounded once, which adds 2.6 % to int4's error (0.0937 in all against 0.0899, on normal weights); a row of x
    is rounded by as much. Products accumulate in fp32 as cuBLAS's e4m3 products do; an update (an adapter's part) stays in x's dtype. It
    is added in fp32 to a product that is scaled already: cuBLAS would add it to a rounded one, where half a unit in the last place of bf16
    hides it.

    Both products contract the last axis of both operands, for which the input gradient decodes the weight transposed.
    """

    base: Any
    scale: Any

    @classmethod
    def of(cls, base: AbstractWeight) -> "Float8":
        """Wraps a leaf, stacked or not; the scale is its largest magnitude over 448.

        >>> from jaxlora.weights.dense import Dense
        >>> w = Float8.of(Dense(jnp.array([[1.0, -2.0]])))
        >>> w.shape, round(float(w.scale * 448), 4)
        ((1, 2), 2.0)
        """
        largest = base.largest()
        return cls(base, jnp.where(largest > 0, largest / LARGEST, 1.0))

    @property
    def shape(self) -> tuple[int, int]:
        """The logical (out, in)."""
        return self.base.shape

    @property
    def trainable(self) -> bool:
        """Rounded weights have no gradient."""
        return False

    @property
    def decoded(self) -> bool:
        """Its products are not those of the decoded array."""
        return False

    def dequantise(self) -> Float[Array, "O I"]:
        """The weight as ``base`` has it, without the rounding to e4m3: what is merged and exported."""
        return self.base.dequantise()

    def largest(self) -> Float[Array, "*layers"]:
        """As of ``base``."""
        return self.base.largest()

    def cotangent(self, x: Float[Array, "N I"], dy: Float[Array, "N O"]) -> None:
        """None: it is never trained."""

    def above(self, others: Sequence[AbstractWeight]) -> "Float8 | None":
        """One leaf of the joined weights, under the largest of their scales; None where a gradient's rows would be too wide."""
        if self.shape[0] + sum(other.shape[0] for other in others) > _WIDEST:
            return None
        alike = [other for other in others if isinstance(other, Float8)]
        joined = self.base.above([other.base for other in alike]) if len(alike) == len(others) else None
        if joined is None:
            return None
        return Float8(joined, jnp.stack([self.scale, *(other.scale for other in alike)]).max())

    def matmul(self, x: Float[Array, "N I"], update: LowRank | None = None) -> Float[Array, "N O"]:
        """x @ Wᵀ (+ u @ bᵀ)."""
        return scale_rows(*self.matmul_apart(x), None if update is None else contract_last(*update))

    def matmul_t(self, dy: Float[Array, "N O"], update: LowRank | None = None) -> Float[Array, "N I"]:
        """dy @ W (+ u @ a)."""
        return scale_rows(*self.matmul_t_apart((dy,)), None if update is None else contract_first(*update))

    def matmul_apart(self, x: Float[Array, "N I"]) -> tuple[Float[Array, "N O"], Float[Array, " N"]]:
        """x₈ W₈ᵀ and scale · s, by which its rows are multiplied."""
        w = self.base.float8(self.scale)
        return self._product((jnp.pad(x, ((0, 0), (0, w.shape[1] - x.shape[1]))),), w)

    def matmul_t_apart(self, dys: Sequence[Float[Array, "N _"]]) -> tuple[Float[Array, "N I"], Float[Array, " N"]]:
        """dy₈ W₈ and scale · s, by which its rows are multiplied."""
        # The barrier: XLA would otherwise write the gradients that it fuses with in fp32, and read them again for their largest.
        dys = jax.lax.optimization_barrier(tuple(dys))
        z, scales = self._product(dys, self.base.float8(self.scale, transpose=True))
        return z[:, : self.shape[1]], scales

    def _product(self, parts: Sequence[Float[Array, "N _"]], w: Float[Array, "F C"]) -> tuple[Float[Array, "N F"], Float[Array, " N"]]:
        """(x₈ wᵀ, scale · s) of the rows x of all parts."""
        rounded, scales = float8_rows(parts[0], parts[1:])
        # The barrier: XLA would otherwise convert back and multiply in bf16.
        rounded, w = jax.lax.optimization_barrier((rounded, w))
        raw = jax.lax.dot_general(rounded, w, (((1,), (1,)), ((), ())), preferred_element_type=parts[0].dtype)
        return raw, scales * self.scale
