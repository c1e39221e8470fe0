"""The gated half of an MLP with both adapters: one entry, one reference, several backends."""

from pallas_kernels.lora_swiglu.activations import product
from pallas_kernels.lora_swiglu.front import KERNEL, gated, lora_swiglu, reference

__all__ = ["KERNEL", "gated", "lora_swiglu", "product", "reference"]
