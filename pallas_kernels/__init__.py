"""Kernels: arrays in, arrays out."""

from pallas_kernels._kernel import Case, Kernel, device
from pallas_kernels.adapted_activation import KERNEL as _ADAPTED_ACTIVATION
from pallas_kernels.adapted_activation import adapted_activation
from pallas_kernels.adapted_sum import KERNEL as _ADAPTED_SUM
from pallas_kernels.adapted_sum import adapted_sum
from pallas_kernels.attention import KERNEL as _ATTENTION
from pallas_kernels.attention import attention, check_cudnn_packing
from pallas_kernels.float8_rows import KERNEL as _FLOAT8_ROWS
from pallas_kernels.float8_rows import float8_rows
from pallas_kernels.float8_transposed import KERNEL as _FLOAT8_TRANSPOSED
from pallas_kernels.float8_transposed import float8_transposed
from pallas_kernels.float8_weight import KERNEL as _FLOAT8_WEIGHT
from pallas_kernels.float8_weight import float8_weight
from pallas_kernels.gated_gradients import KERNEL as _GATED_GRADIENTS
from pallas_kernels.gated_gradients import gated_gradients
from pallas_kernels.int4_matmul import KERNEL as _INT4_MATMUL
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.linear_cross_entropy import KERNEL as _LINEAR_CROSS_ENTROPY
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.logsumexp import KERNEL as _LOGSUMEXP
from pallas_kernels.logsumexp import logsumexp
from pallas_kernels.lora_input import KERNEL as _LORA_INPUT
from pallas_kernels.lora_input import lora_input
from pallas_kernels.lora_swiglu import KERNEL as _LORA_SWIGLU
from pallas_kernels.lora_swiglu import lora_swiglu
from pallas_kernels.norm_gradient import KERNEL as _NORM_GRADIENT
from pallas_kernels.norm_gradient import norm_gradient
from pallas_kernels.packed import Packed
from pallas_kernels.plain_gradients import KERNEL as _PLAIN_GRADIENTS
from pallas_kernels.plain_gradients import plain_gradients

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        _ADAPTED_ACTIVATION,
        _ADAPTED_SUM,
        _ATTENTION,
        _FLOAT8_ROWS,
        _FLOAT8_TRANSPOSED,
        _FLOAT8_WEIGHT,
        _GATED_GRADIENTS,
        _INT4_MATMUL,
        _LINEAR_CROSS_ENTROPY,
        _LOGSUMEXP,
        _LORA_INPUT,
        _LORA_SWIGLU,
        _NORM_GRADIENT,
        _PLAIN_GRADIENTS,
    )
}

__all__ = [
    "KERNELS",
    "Case",
    "Kernel",
    "Packed",
    "adapted_activation",
    "adapted_sum",
    "attention",
    "check_cudnn_packing",
    "device",
    "float8_rows",
    "float8_transposed",
    "float8_weight",
    "gated_gradients",
    "int4_matmul",
    "linear_cross_entropy",
    "logsumexp",
    "lora_input",
    "lora_swiglu",
    "norm_gradient",
    "plain_gradients",
]
