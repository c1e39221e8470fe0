"""The trainable low-rank pair of a Linear."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA:
    """The update s·B·A of a weight [O, I] (Hu et al. 2021, arXiv:2106.09685), stored as PEFT stores it.

    ``a`` [R, I] and ``b`` [O, R] are fp32 and trained; ``scale`` is an fp32 scalar array, s = alpha/r or alpha/sqrt(r) (rsLoRA). It is an
    array, not a Python float, so that alpha patterns do not split stacks and adapters switch without recompiling.
    """

    a: Any
    b: Any
    scale: Any

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[-2]
