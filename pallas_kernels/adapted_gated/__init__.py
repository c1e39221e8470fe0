"""What follows a gated MLP's two products whose rows are yet to be scaled: their adapters, the activation, and the next one's columns."""

from pallas_kernels.adapted_gated.front import KERNEL, adapted_gated, reference

__all__ = ["KERNEL", "adapted_gated", "reference"]
