"""A 4-bit weight as e4m3 numbers."""

from pallas_kernels.float8_weight.front import KERNEL, float8_weight, reference

__all__ = ["KERNEL", "float8_weight", "reference"]
