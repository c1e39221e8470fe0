"""What an adapted gated MLP's backward makes of one pass over its wide activations."""

from pallas_kernels.gated_gradients.front import KERNEL, gated_gradients, reference

__all__ = ["KERNEL", "gated_gradients", "reference"]
