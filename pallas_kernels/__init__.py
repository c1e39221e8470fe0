"""Kernels: arrays in, arrays out."""

from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.attention import KERNEL as _ATTENTION
from pallas_kernels.attention import attention, check_cudnn_packing
from pallas_kernels.linear_cross_entropy import KERNEL as _LINEAR_CROSS_ENTROPY
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        _ATTENTION,
        _LINEAR_CROSS_ENTROPY,
    )
}

__all__ = ["KERNELS", "Case", "Kernel", "attention", "check_cudnn_packing", "linear_cross_entropy"]
