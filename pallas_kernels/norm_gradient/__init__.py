"""The gradient of a norm together with what comes past it."""

from pallas_kernels.norm_gradient.front import KERNEL, norm_gradient, reference

__all__ = ["KERNEL", "norm_gradient", "reference"]
