"""The logarithm of the sum of exponentials of rows."""

from pallas_kernels.logsumexp.front import KERNEL, logsumexp, reference

__all__ = ["KERNEL", "logsumexp", "reference"]
