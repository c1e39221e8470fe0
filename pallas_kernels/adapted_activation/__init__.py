"""What follows an MLP's first products where their rows are yet to be scaled: adapters, the activation, and the next one's columns."""

from pallas_kernels.adapted_activation.front import KERNEL, adapted_activation, reference

__all__ = ["KERNEL", "adapted_activation", "reference"]
