"""Rows rounded to e4m3, each under a scale of its own."""

from pallas_kernels.float8_rows.front import E4M3, KERNEL, LARGEST, float8_rows, reference

__all__ = ["E4M3", "KERNEL", "LARGEST", "float8_rows", "reference"]
