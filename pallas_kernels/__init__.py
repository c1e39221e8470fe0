"""Kernels: arrays in, arrays out."""

from pallas_kernels._kernel import Case, Kernel, device
from pallas_kernels.attention import KERNEL as _ATTENTION
from pallas_kernels.attention import attention, check_cudnn_packing
from pallas_kernels.gated_gradients import KERNEL as _GATED_GRADIENTS
from pallas_kernels.gated_gradients import gated_gradients
from pallas_kernels.int4_matmul import KERNEL as _INT4_MATMUL
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.linear_cross_entropy import KERNEL as _LINEAR_CROSS_ENTROPY
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.lora_swiglu import KERNEL as _LORA_SWIGLU
from pallas_kernels.lora_swiglu import lora_swiglu
from pallas_kernels.packed import Packed

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        _ATTENTION,
        _GATED_GRADIENTS,
        _INT4_MATMUL,
        _LINEAR_CROSS_ENTROPY,
        _LORA_SWIGLU,
    )
}

__all__ = [
    "KERNELS",
    "Case",
    "Kernel",
    "Packed",
    "attention",
    "check_cudnn_packing",
    "device",
    "gated_gradients",
    "int4_matmul",
    "linear_cross_entropy",
    "lora_swiglu",
]
