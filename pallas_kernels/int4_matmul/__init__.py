"""Products with 4-bit weights: one entry, one reference, several backends."""

from pallas_kernels.int4_matmul.front import KERNEL, int4_matmul, reference

__all__ = ["KERNEL", "int4_matmul", "reference"]
