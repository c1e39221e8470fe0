"""The input of adapted Linears, made together with the columns that their adapters make of it."""

from pallas_kernels.lora_input.front import KERNEL, lora_input, reference

__all__ = ["KERNEL", "lora_input", "reference"]
