"""A product that is yet to be scaled, and its adapter's part."""

from pallas_kernels.adapted_sum.front import KERNEL, adapted_sum, reference

__all__ = ["KERNEL", "adapted_sum", "reference"]
