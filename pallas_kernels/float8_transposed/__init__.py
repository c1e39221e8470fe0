"""4-bit weights as e4m3 numbers, transposed."""

from pallas_kernels.float8_transposed.front import KERNEL, float8_transposed, reference

__all__ = ["KERNEL", "float8_transposed", "reference"]
