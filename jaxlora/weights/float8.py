"""A frozen weight whose products run in e4m3 on the tensor cores of sm89 and up: twice the arithmetic of bf16, for 3 more bits of noise."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.typing import Array, Float
from jaxlora.weights.base import AbstractWeight, LowRank, input_gradient, scale_rows
from pallas_kernels.adapted_sum import adapted_sum
from pallas_kernels.float8_rows import E4M3, LARGEST, float8_rows
from pallas_kernels.float8_transposed import float8_transposed
from pallas_kernels.float8_weight import float8_weight
from pallas_kernels.packed import Packed

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

    Both products contract the last axis of both operands, for which the input gradient decodes the weight transposed. The kernel that does
    so finds the codes of layer ``layer``, int32 [], in ``stack``, those of all layers, so that no copy is made of them for it.
    """

    base: Any
    scale: Any
    layer: Any = None
    stack: Any = None

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

    def numbered(self, *, known: bool = False) -> "Float8":
        """Each with its layer's number, where the codes are those of a stack."""
        if self.scale.ndim == 0 or self.base.code_rows is None:
            return self
        return dataclasses.replace(self, layer=jnp.arange(len(self.scale), dtype=jnp.int32))

    def within(self, stack: AbstractWeight) -> "Float8":
        """With the codes of all layers."""
        assert isinstance(stack, Float8)
        return self if self.layer is None else dataclasses.replace(self, stack=stack.base.code_rows)

    def joins(self, others: Sequence[AbstractWeight]) -> bool:
        """Alone, and with weights of codes of one format, unless a gradient's rows would be too wide."""
        weights = [w for w in (self, *others) if isinstance(w, Float8) and w.base.code_rows is not None]
        alike = len(weights) == len(others) + 1 and len({(type(w.base), w.shape[1]) for w in weights}) == 1
        return not others or (alike and sum(w.shape[0] for w in weights) <= _WIDEST)

    def matmul(self, x: Float[Array, "N I"], update: LowRank | None = None) -> Float[Array, "N O"]:
        """x @ Wᵀ (+ u @ bᵀ)."""
        apart = self.matmul_apart(x)
        return scale_rows(*apart) if update is None else adapted_sum(*apart, *update)

    def matmul_t(self, dy: Float[Array, "N O"], update: LowRank | None = None) -> Float[Array, "N I"]:
        """dy @ W (+ u @ a)."""
        return input_gradient((self,), (dy,), update)

    def rounded(self) -> Float[Array, "O columns"]:
        """W₈ [O, I'], with zeros where storage pads I to I'."""
        packed = self._packed()
        if packed is None:
            return (self.base.dequantise().astype(jnp.float32) / self.scale).astype(E4M3)
        return float8_weight(packed, self.scale)

    def matmul_apart(self, x: Float[Array, "N I"]) -> tuple[Float[Array, "N O"], Float[Array, " N"]]:
        """x₈ W₈ᵀ and scale · s, by which its rows are multiplied."""
        w = self.rounded()
        return self._product([jnp.pad(x, ((0, 0), (0, w.shape[1] - x.shape[1])))], w, self.scale)

    def matmul_t_apart(
        self, dys: Sequence[Float[Array, "N _"]], others: Sequence[AbstractWeight] = ()
    ) -> tuple[Float[Array, "N I"], Float[Array, " N"]]:
        """dy₈ W₈ and scale · s, by which its rows are multiplied; the largest of the weights' scales is that of all of them."""
        weights = [self, *(w for w in others if isinstance(w, Float8))]
        scale = jnp.stack([w.scale for w in weights]).max()
        # The barrier: XLA would otherwise write the gradients that it fuses with in fp32, and read them again for their largest.
        dys = jax.lax.optimization_barrier(tuple(dys))
        z, scales = self._product(dys, _transposed(weights, scale), scale)
        return z[:, : self.shape[1]], scales

    @staticmethod
    def _product(
        parts: Sequence[Float[Array, "N _"]], w: Float[Array, "F C"], scale: Float[Array, ""]
    ) -> tuple[Float[Array, "N F"], Float[Array, " N"]]:
        """(x₈ wᵀ, scale · s) of the rows x of all parts."""
        rounded, scales = float8_rows(parts[0], parts[1:])
        # The barrier: XLA would otherwise convert back and multiply in bf16.
        rounded, w = jax.lax.optimization_barrier((rounded, w))
        raw = jax.lax.dot_general(rounded, w, (((1,), (1,)), ((), ())), preferred_element_type=parts[0].dtype)
        return raw, scales * scale

    def _packed(self) -> Packed | None:
        """The codes, in their stack where that is known; None where there are none."""
        if self.base.code_rows is None:
            return None
        packed = self.base.packed()
        return packed if self.stack is None else dataclasses.replace(packed, codes=self.stack, layer=self.layer)


def _transposed(weights: Sequence[Float8], scale: Float[Array, ""]) -> Float[Array, "columns O"]:
    """e4m3(w / scale)ᵀ of the weights on top of each other."""
    packed = [part for w in weights if (part := w._packed()) is not None]
    if packed:
        return float8_transposed(packed, scale)
    (alone,) = weights
    return alone.rounded().T
