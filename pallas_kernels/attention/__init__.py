"""Attention over packed rows: one entry, one reference, several backends."""

from pallas_kernels.attention.cudnn import check_packing as check_cudnn_packing
from pallas_kernels.attention.front import KERNEL, attention
from pallas_kernels.attention.reference import reference
from pallas_kernels.attention.spec import Alike, Intervals, cover

__all__ = ["KERNEL", "Alike", "Intervals", "attention", "check_cudnn_packing", "cover", "reference"]
