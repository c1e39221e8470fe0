"""What an adapted MLP's backward, without a gate, makes of one pass over its wide activations."""

from pallas_kernels.plain_gradients.front import KERNEL, plain_gradients, reference

__all__ = ["KERNEL", "plain_gradients", "reference"]
