"""Kernels: arrays in, arrays out."""

from pallas_kernels._kernel import Case, Kernel
from pallas_kernels.attention import KERNEL as _ATTENTION
from pallas_kernels.attention import attention, check_cudnn_packing

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        _ATTENTION,
    )
}  # fmt: skip

__all__ = ["KERNELS", "Case", "Kernel", "attention", "check_cudnn_packing"]
